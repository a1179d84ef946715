"""Runs that measure nothing leave nothing, and runs that are looked for in the wrong way are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktverify.bench import record as bench_record
from ktverify.bench.layer import profile_record
from ktverify.bench.layer import record as layer_record
from ktverify.bench.transformer import record as transformer_record
from ktverify.runs import store
from tests.support.command_line import call, python, refused

# a port that nothing listens on
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "c2c", "single", "--base_model", "no/such"],
        ["bench", "c2c", "batch", "--teacher_model", "no/such", "--base_model", "no/such"],
    ],
    ids=lambda words: words[2],
)
def test_a_hub_that_cannot_be_reached_is_named_at_once(arguments: list[str], tmp_path: Path) -> None:
    done = python("-m", "ktverify", *arguments, folder=tmp_path, HF_HOME=str(tmp_path / "cache"), **NOWHERE)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "'no/such' is no directory here" in line
    assert "127.0.0.1 cannot be reached" in line
    assert list((tmp_path / "reports" / "runs").iterdir()) == []


def test_a_run_that_fails_before_its_first_result_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("bench", "layer", "small", "--isa", "sse9", "--repeats", 1)
    assert result.exit_code != 0
    assert not list((tmp_path / "reports" / "runs").iterdir())


@pytest.mark.parametrize("command", ["profile", "bench layer", "bench sweep", "bench transformer", "bench shapes"])
def test_a_run_to_show_that_is_not_there_is_named(command: str, tmp_path: Path) -> None:
    refused(call(*command.split(), "--show", tmp_path / "nothere"), "no run at .*nothere")


def test_report_names_the_command_of_a_timed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "reports" / "runs" / "20260101T000000Z-layer"
    directory.mkdir(parents=True)
    (directory / "layer.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("20260101T000000Z-layer", "20260101", str(directory)):
        refused(call("report", name), r"python -m ktverify bench layer --show .*20260101T000000Z-layer")
    refused(call("report", "20270101"), "no run")


def test_the_files_of_all_timed_runs_are_known() -> None:
    written = {module.FILE for module in (bench_record, layer_record, profile_record, transformer_record)}
    assert written == set(store._SHOWN_BY)
