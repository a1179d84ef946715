"""Engines outside of the package: declared gaps, crashes, hangs, and the example, each judged by a whole run."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from ktverify.checks import isas
from ktverify.isolation.child import DEFAULT
from ktverify.pytest_plugin.options import judges_an_engine
from ktverify.runs.record import AccuracyRecord, AnyRecord
from ktverify.runs.store import load
from ktverify.spec.cases import select
from ktverify.system.files import ROOT
from tests.support import unruly
from tests.support.command_line import run_pytest


def what(record: AnyRecord) -> str:
    """A short name of what a record judges."""
    if isinstance(record, AccuracyRecord):
        return f"{record.family} {record.case.partition('@')[0]}"
    return f"{record.family} {getattr(record, 'name', '')}"


def test_misbehaviour_costs_its_own_cases(tmp_path: Path) -> None:
    families = ("suites/forward", "suites/backward", "suites/tp_constraint")
    limits = ("--cases=tokens_*", "--time-limit=10", "--memory-limit=1")
    done = run_pytest(tmp_path / "run", *families, "--engine=tests.support.unruly:Unruly", *limits)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    records = load(tmp_path / "run").records
    found = {what(record): record for record in records}
    # many processes died; the other cases of the run are judged as if none had
    crashed = {name for name, record in found.items() if record.verdict == "CRASH"}
    deadly = {f"{family} tokens_{tokens}" for family in ("forward", "backward") for tokens in unruly.DEADLY_TOKENS}
    assert len(crashed) > 50
    assert deadly <= crashed
    assert {name: found[name].verdict for name in found if found[name].verdict != "CRASH"} == {
        f"backward tokens_{unruly.HANGS}": "TIMEOUT",
        f"backward tokens_{unruly.EATS}": "OOM",
        **{f"forward tokens_{tokens}": "PASS" for tokens in (unruly.HANGS, unruly.EATS, unruly.EXITS)},
        **{f"tp_constraint test_degree[47-{degree}]": "PASS" for degree in (1, 2, 47)},
    }
    for name, words in (
        ("forward tokens_15", ["SIGSEGV"]),
        (f"backward tokens_{unruly.HANGS}", ["going to sleep", "no answer after 10 s"]),
        (f"backward tokens_{unruly.EATS}", ["the limit is 1.0 GiB"]),
        (f"backward tokens_{unruly.EXITS}", [f"exit code {unruly.EXIT_CODE}", "leaving"]),
    ):
        assert all(word in found[name].message for word in words), found[name].message
    for word in ("CRASH", "TIMEOUT", "OOM"):
        assert f" {word}" in (tmp_path / "run" / "accuracy.md").read_text(encoding="utf-8").partition("\n- ")[0]


def test_a_run_without_any_pass_fails(tmp_path: Path) -> None:
    done = run_pytest(
        tmp_path / "run", "suites/tp_constraint", "suites/forward", "--engine=tests.support.unruly:Nothing",
        "--cases=tiny",
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert {record.verdict for record in load(tmp_path / "run").records} == {"UNSUPPORTED"}
    assert "Nothing was checked" in (tmp_path / "run" / "accuracy.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the example engine."""
    found = tmp_path / "else where"
    found.mkdir()
    shutil.copy(ROOT / "examples" / "engine_outside" / "my_engine.py", found)
    return found


def test_the_example_is_judged_from_its_own_folder(tmp_path: Path, folder: Path) -> None:
    families = [str(ROOT / "suites" / family) for family in ("forward", "backward", "tp_consistency")]
    done = run_pytest(
        tmp_path / "run", *families, f"--rootdir={ROOT}", "--engine=my_engine:Engine", "--cases=small",
        "-k=small or gaussian", folder=folder, path=folder,
    )  # fmt: skip
    verdicts = Counter((record.family, record.verdict) for record in load(tmp_path / "run").records)
    assert verdicts["forward", "PASS"] == 1, done.stdout + done.stderr
    assert verdicts["backward", "PASS"] == 8
    assert verdicts["tp_consistency", "UNSUPPORTED"] == 1
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert "UNSUPPORTED tensor parallelism" in done.stdout
    assert "(1 UNSUPPORTED)" in (tmp_path / "run" / "accuracy.md").read_text(encoding="utf-8")


def test_the_readmes_first_command_leaves_the_big_cases_out() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = "pytest suites/forward suites/backward suites/training_loop --tier default --engine path/file.py:factory"
    assert command in " ".join(text.split())
    largest = max(case.num_experts * case.hidden * case.intermediate for case in select(None, tier="default"))
    # all weights of a case are a small part of a call's memory limit, so that an engine may copy them
    assert 6 * largest < DEFAULT.memory / 8


def test_a_relative_path_is_one_from_where_the_run_was_started(tmp_path: Path, folder: Path) -> None:
    suite = [str(ROOT / "suites" / "forward"), f"--rootdir={ROOT}", "--cases=tiny"]
    done = run_pytest(tmp_path / "run", *suite, "--engine=my_engine.py:Engine", folder=folder, path=folder)
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    head = load(tmp_path / "run").head
    assert head is not None
    assert head.engine == f"{folder}/my_engine.py:Engine"


def test_a_seed_that_is_drawn_is_one_for_all_workers_and_in_the_command(tmp_path: Path) -> None:
    suite = ("suites/forward", "suites/backward", "--engine=torch_bf16", "--cases=tiny", "-n", "2")
    done = run_pytest(tmp_path / "run", *suite, "--fresh", "auto")
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    run = load(tmp_path / "run")
    assert run.head is not None
    seed = run.head.command.rpartition("--fresh ")[2]
    assert seed.isdecimal()
    assert f"new inputs: --fresh {seed}" in done.stdout
    assert {record.case for record in run.accuracy} == {f"tiny@seed={seed}"}
    assert {record.source for record in run.accuracy} == {"fresh"}


@pytest.mark.parametrize(
    ("asked", "judges"),
    [([], True), (["suites", "tests/judge"], True), (["suites/forward"], True), (["tests"], False), (["."], True)],
)
def test_only_suites_leave_records(pytestconfig: pytest.Config, asked: list[str], judges: bool) -> None:
    args = asked or pytestconfig.getini("testpaths")
    config = SimpleNamespace(args=args, invocation_params=SimpleNamespace(dir=ROOT))
    assert judges_an_engine(cast(pytest.Config, config)) is judges


def test_only_known_instruction_sets_are_declared() -> None:
    assert [isa.name for isa in isas.planned("tests.support.unruly:Choosy")] == ["avx2"]
    assert [isa.name for isa in isas.planned("tests.support.unruly:Unruly")] == [None]
    with pytest.raises(ValueError, match=r"--isa scalar: engine .*Choosy has no such"):
        isas.planned("tests.support.unruly:Choosy", "scalar")
