"""Options of `bench`: the GPU that is named, the JSON lines of shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ktverify.bench import record, timed_run
from ktverify.bench.transformer import measure
from ktverify.bench.transformer.record import TransformerSettings
from ktverify.bench.transformer.sizes import resolve
from ktverify.cli.main import app
from ktverify.errors import NothingMeasured
from ktverify.isolation.interrupt import INTERRUPTED
from ktverify.system import machine


@pytest.mark.parametrize(("device", "wanted"), [("cpu", []), ("cuda", []), ("cuda:1", [1])])
def test_the_given_gpu_is_timed(device: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)

    def stop(settings: TransformerSettings) -> None:
        raise KeyboardInterrupt  # the next statement needs that device

    monkeypatch.setattr(measure, "Stepper", stop)
    settings = TransformerSettings(size=resolve("small", {}), device=device, warmup_steps=0, num_steps=1)
    with pytest.raises(KeyboardInterrupt):
        next(measure.process_lines(settings))
    assert chosen == wanted


@pytest.mark.parametrize("forward_only", [False, True])
def test_the_independent_loop_calls_nothing_of_the_stepper(forward_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"d_model": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32, "context_length": 4}
    size = resolve("small", {**sizes, "batch_size": 1})
    stepper = measure.Stepper(TransformerSettings(size=size, forward_only=forward_only))

    def refuse(*arguments: object) -> None:
        raise AssertionError("the loop is not independent")

    for name in ("forward", "backward", "timed"):
        monkeypatch.setattr(measure.Stepper, name, refuse)
    monkeypatch.setattr("ktverify.system.timing.Clock.time", refuse)
    assert stepper.loop() > 0
    assert (stepper.model.embedding.weight.grad is None) == forward_only


def test_an_earlier_run_is_printed_as_lines(tmp_path: Path) -> None:
    journal = record.BenchJournal(tmp_path)
    head = record.HeadLine(
        stamp="s", command="c", commit="", machine=machine.read_machine(), engines=(), threads=1, rounds=1, warmup=3,
        runs=1, isa="",
    )  # fmt: skip
    journal.add(head)
    journal.close()
    done = CliRunner().invoke(app, ["bench", "--show", str(tmp_path), "--json"])
    assert done.exit_code == 1  # nothing was measured, so nothing was right
    assert [record.HeadLine.model_validate_json(line) for line in done.stdout.splitlines()] == [head]


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "profile.jsonl").touch()
    done = CliRunner().invoke(app, ["bench", "layer", "--show", str(tmp_path)])
    assert done.exit_code == 2
    assert "has no layer.jsonl, which this command wrote; it has profile.jsonl" in done.output


@pytest.mark.parametrize("stopped", [True, False])
def test_only_a_stopped_run_may_have_no_result(stopped: bool, tmp_path: Path) -> None:
    def lines() -> Iterator[timed_run.OtherLoadLine]:
        yield timed_run.OtherLoadLine(others=0.0)
        if stopped:
            raise KeyboardInterrupt

    def run(error: Exception) -> int:
        def conclude(directory: Path, lines: list[object]) -> bool:
            raise error

        out = tmp_path / type(error).__name__
        return timed_run.measure("layer", "lines.jsonl", timed_run.RunLine, lines(), 1, conclude, out)

    with pytest.raises(ValueError, match="drawing"):
        run(ValueError("drawing"))
    with contextlib.nullcontext() if stopped else pytest.raises(NothingMeasured):
        assert run(NothingMeasured("no repeat")) == INTERRUPTED
