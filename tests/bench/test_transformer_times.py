"""`bench transformer`: which steps count, in which process, what is refused. No time is judged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from ktverify.bench.transformer import measure as transformer_measure
from ktverify.bench.transformer import memory, record
from ktverify.bench.transformer import views as transformer_views
from ktverify.bench.transformer.measure import Stepper, agreement
from ktverify.bench.transformer.record import EndLine, ProcessLine, StepLine, TransformerLine, TransformerSettings
from ktverify.bench.transformer.sizes import presets
from ktverify.isolation import process
from tests.bench.test_transformer import TINY
from tests.support.command_line import call, ends, refused
from tests.support.records import MACHINE

SIZES = (
    "--d_model", "64", "--d_ff", "96", "--num-layers", "2", "--num_heads", "4", "--context_length", "8",
    "--vocab_size", "50", "--batch_size", "2", "--threads", "1",
)  # fmt: skip
MS = 1_000_000


def made_up(*, loop: float | None = None) -> list[record.Line]:
    """Two processes: without warm-ups steps of 30 and 20 ms, with one warm-up of 25 ms steps of 10 and 20 ms."""
    size = TINY
    head = TransformerLine(
        stamp="stamp",
        command="c",
        commit="abc",
        machine=MACHINE,
        settings=TransformerSettings(size=size),
        warmups=(0, 1),
    )
    found: list[record.Line] = [head]
    for warmup, steps in ((0, (30, 20)), (1, (25, 10, 20))):
        found.append(ProcessLine(warmup=warmup, device="cpu", threads=1))
        for place, ms in enumerate(steps):
            loop_ns, forward = int(loop * ms * MS) if loop is not None else None, ms * MS // 5
            ns: dict[str, Any] = {"forward_ns": forward, "backward_ns": 4 * forward, "loop_ns": loop_ns}
            found.append(StepLine(warmup=warmup, step=place - warmup, **ns))
        found.append(EndLine(warmup=warmup, peak=1 << 30, loss=1.0))
    return found


def test_warm_ups_do_not_count() -> None:
    without, with_one = transformer_views.arms(made_up())
    steps = [arm.ms("step") for arm in (without, with_one)]
    assert [(ms.count, ms.mean, ms.max) for ms in steps if ms is not None] == [(2, 25.0, 30.0), (2, 15.0, 20.0)]
    view = transformer_views.view(made_up())
    assert view is not None
    assert view.verdict.endswith("with 0 warm-ups the mean step is 1.67 times that with 1")
    assert view.grids[-1].rows[0] == ("0 warm-ups", "25.0", "7.07", "20.0", "30.0", "25.0", "30.0", "1.667")


def test_rates_are_those_of_the_median() -> None:
    lines = made_up()
    head = lines[0]
    assert isinstance(head, TransformerLine)
    grid = transformer_views.times_grid(head, transformer_views.arms(lines)[-1], ())
    # 48 tokens in 3 ms forward, 12 ms backward, 15 ms together
    assert [row[-2] for row in grid.rows] == ["16,000", "4,000", "3,200"]
    assert grid.notes == ("1 warm-up before 2 steps that count, the first 25.0 ms; at most 1.0 GiB of memory",)


@pytest.mark.parametrize(("loop", "word"), [(1.02, "PASS"), (1.05, "FAIL"), (0.95, "FAIL")])
def test_a_step_that_differs_from_the_independent_loop_fails(loop: float, word: str) -> None:
    ((name, text),) = transformer_views.check_pairs(transformer_views.arms(made_up(loop=loop)))
    assert (name, text.split()[0]) == ("check", word)
    ((_, busy),) = transformer_views.check_pairs(transformer_views.arms(made_up(loop=loop)), ("others were busy",))
    assert busy.startswith(text)
    assert ("other programs" in busy) == (word == "FAIL")
    with pytest.raises(ValueError, match="independent loop"):
        agreement([line for line in made_up() if isinstance(line, StepLine)])


def test_a_step_computes_gradients_anew_and_forward_only_none() -> None:
    stepper = Stepper(TransformerSettings(size=TINY))
    next(stepper.timed())
    first = stepper.model.embedding.weight.grad
    assert first is not None
    kept = first.clone()
    stepper.loop()
    again = stepper.model.embedding.weight.grad
    assert again is not None
    assert (again == kept).all(), "gradients were added up"
    stepper = Stepper(TransformerSettings(size=TINY, forward_only=True))
    assert set(next(stepper.timed())[1]) == {"forward"}
    assert not stepper.loss.requires_grad
    stepper.loop()
    assert stepper.model.embedding.weight.grad is None


@pytest.mark.parametrize("forward_only", [False, True])
def test_what_does_not_fit_is_refused_with_what_it_needs(monkeypatch: pytest.MonkeyPatch, forward_only: bool) -> None:
    monkeypatch.setattr(transformer_measure, "free_bytes", lambda device: 8 << 30)
    with pytest.raises(MemoryError, match=r"2\.7b needs .* GiB for forward.* 8\.0 GiB are free on cpu") as caught:
        transformer_measure.check_fits(TransformerSettings(size=presets()["2.7b"], forward_only=forward_only))
    assert ("--forward_only" in str(caught.value)) is not forward_only
    transformer_measure.check_fits(TransformerSettings(size=presets()["small"], forward_only=forward_only))


def test_the_least_memory_contains_the_saved_tensors() -> None:
    for size in presets().values():
        whole = memory.step_memory(size).all
        kept = whole.parameter_bytes + whole.gradient_bytes + whole.activation_bytes
        assert memory.timing_bytes(size, forward_only=False) > kept
        assert memory.timing_bytes(size, forward_only=True) > whole.parameter_bytes


def test_the_last_words_of_a_dead_process_are_reported() -> None:
    with pytest.raises(RuntimeError, match=r"the measuring process ended with 1: RuntimeError: .*device type.*: tpus"):
        list(process.lines_of(transformer_measure.__name__, TransformerSettings(size=TINY, device="tpus")))


def test_a_process_ends_with_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = process.lines_of("sleeper", ProcessLine(warmup=0, device="cpu", threads=1))
    sleeper = psutil.Process(int(next(lines)))
    # as an interrupted run does
    lines.close()
    assert not sleeper.is_running()


def test_transformer_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = ends(call("bench", "transformer", *SIZES, "--warmup_steps", "1", "--num_steps", "2", "--out", str(out)), 0)
    for wanted in ("small*: forward", "tokens/s", "1 warm-up before 2 steps that count", "d_model 64, d_ff 96"):
        assert wanted in text
    assert {path.suffix for path in out.iterdir()} == {".jsonl", ".md", ".html", ".tsv", ".png"}
    steps = [line for line in record.read(out) if isinstance(line, StepLine)]
    assert [step.step for step in steps] == [-1, 0, 1]
    assert all(step.forward_ns > 0 and (step.backward_ns or 0) > 0 for step in steps)
    assert ends(call("bench", "transformer", "--show", str(out)), 0) == text
    shown = ends(call("bench", "transformer", "--show", str(out), "--json"), 0)
    assert json.loads(shown.splitlines()[0])["kind"] == "transformer"
    refused(call("bench", "transformer", "small", "--device", "tpu"), "--device is 'tpu', it takes cpu, cuda")
    refused(call("bench", "transformer", "tiny"), "no preset is called 'tiny'")


def test_warmup_study_uses_new_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    lines = {warmup: [line for line in made_up() if getattr(line, "warmup", None) == warmup] for warmup in (0, 1)}

    def lines_of(module: str, settings: TransformerSettings) -> list[str]:
        assert module == transformer_measure.__name__
        asked.append(settings.warmup_steps)
        found = lines[min(1, settings.warmup_steps)]
        return [line.model_copy(update={"warmup": settings.warmup_steps}).model_dump_json() for line in found]

    monkeypatch.setattr(process, "lines_of", lines_of)
    arguments = ("bench", "transformer", *SIZES, "--warmup-study", "--forward_only", "--out", str(tmp_path / "run"))
    text = ends(call(*arguments), 0)
    assert asked == [0, 1, 2, 5]
    assert [line.split()[0] for line in text.splitlines() if re.match(r"\d warm-ups? ", line)] == list("0125")
