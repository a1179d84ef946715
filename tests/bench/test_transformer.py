"""The timed transformer: it computes what it says, its counts are those of its parameters and of autograd; which of its
steps count, in which process, and what is refused. No time is judged."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ktverify.bench.transformer import measure, memory, record, saved_tensors, views
from ktverify.bench.transformer.measure import Stepper, agreement
from ktverify.bench.transformer.memory import step_memory
from ktverify.bench.transformer.model import Rope, Transformer, batch_of
from ktverify.bench.transformer.record import EndLine, ProcessLine, StepLine, TransformerLine, TransformerSettings
from ktverify.bench.transformer.saved_tensors import saved_bytes
from ktverify.bench.transformer.sizes import ModelSize, forward_flops, parameters, presets, resolve
from ktverify.cli.bench_transformer import TOLERANCE
from ktverify.isolation import process
from tests.support.command_line import call, ends, refused
from tests.support.records import HEAD

TINY = ModelSize(64, 160, 3, 4, vocab_size=97, context_length=24, batch_size=2)
PARAMETERS = {
    "small": 128_625_408,
    "medium": 423_183_360,
    "large": 969_411_840,
    "xl": 1_998_235_200,
    "2.7b": 3_406_809_600,
}
SIZES = (
    "--d_model", "64", "--d_ff", "96", "--num-layers", "2", "--num_heads", "4", "--context_length", "8",
    "--vocab_size", "50", "--batch_size", "2", "--threads", "1",
)  # fmt: skip
KINDS = ("parameter", "gradient", "optimizer", "activation")
MS = 1_000_000


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_parameters_of_the_model_and_the_activations_that_autograd_saves(name: str) -> None:
    size = presets()[name]
    model = Transformer(size, "meta")
    assert sum(parameters(size).values()) == sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert saved_bytes(size, "meta") == pytest.approx(step_memory(size).all.activation_bytes, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("attention", "device"), [("plain", "cpu"), ("fused", "cpu"), ("plain", "meta")])
def test_activations_are_what_autograd_saves_in_a_forward(dtype: str, attention: str, device: str) -> None:
    # exact, not within the tolerance, so that nothing can be forgotten
    size = replace(TINY, dtype=dtype, attention=attention)
    assert saved_bytes(size, device) == step_memory(size).all.activation_bytes


def test_adamw_state_is_what_is_counted() -> None:
    model = Transformer(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    model(*batch_of(TINY)).backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert sum(moment.nbytes for moment in moments) == step_memory(TINY).all.optimizer_bytes


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = Transformer(TINY, "meta")
    with FlopCounterMode(display=False) as counter:
        model(*batch_of(TINY, "meta"))
    assert counter.get_total_flops() == forward_flops(TINY)


def test_both_attentions_agree() -> None:
    torch.manual_seed(0)
    plain = Transformer(TINY)
    fused = Transformer(replace(TINY, attention="fused"))
    fused.load_state_dict(plain.state_dict())
    tokens, targets = batch_of(TINY)
    torch.testing.assert_close(plain(tokens, targets), fused(tokens, targets))


def test_no_position_sees_a_later_one() -> None:
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens, _ = batch_of(TINY)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % TINY.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12] != after[:, 12]).any()


def test_rotations_keep_lengths_and_depend_on_distance_alone() -> None:
    rope = Rope(16, 24, 10_000.0, "cpu")
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = rope(q.expand(1, 1, 24, 16))[0, 0], rope(k.expand(1, 1, 24, 16))[0, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(24))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products.diagonal(-5), products[5, 0].expand(19), rtol=1e-4, atol=1e-4)
    assert (products[5, 0] - products[9, 0]).abs() > 1e-2


@pytest.mark.parametrize(
    ("preset", "changes", "wanted"),
    [
        ("huge", {}, "no preset is called 'huge'; there are small"),
        ("small", {"num_heads": 7}, "d_model is 768, it takes a multiple of 2 num_heads = 14"),
        ("small", {"dtype": "float8"}, "dtype is 'float8', it takes float32 or bfloat16"),
        ("small", {"attention": "flash"}, "attention is 'flash'"),
        ("small", {"rope_theta": 0.0}, "rope_theta is 0"),
        ("small", {"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_wrong_sizes_are_refused(preset: str, changes: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        resolve(preset, changes)


def test_a_changed_preset_has_another_name() -> None:
    assert resolve("small", {"num_layers": 2, "d_ff": None}).name == "small*"
    assert resolve("small", {"num_layers": 12, "context_length": 7}).name == "small"


def test_memory_command() -> None:
    text = ends(call("bench", "memory", "2.7b", "--check"), 0)
    for wanted in ("3,406,809,600", "12.69", "25.38", "39,600,128", "PASS autograd keeps 9.19 GiB"):
        assert wanted in text
    found = json.loads(ends(call("bench", "memory", "2.7b", "--json"), 0))
    *parts, whole = found["parts"]
    assert whole["parameters"] == 3_406_809_600
    # as published
    assert [round(whole[f"{kind}_bytes"] / 2**30, 2) for kind in KINDS[:3]] == [12.69, 12.69, 25.38]
    assert found["total_bytes"] == sum(part[f"{kind}_bytes"] for part in parts for kind in KINDS)
    refused(call("bench", "memory", "huge"), "no preset is called 'huge'")


def test_a_wrong_count_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = saved_bytes(presets()["small"], "meta")
    monkeypatch.setattr(saved_tensors, "saved_bytes", lambda size, device: int(honest * 1.06))
    assert "FAIL autograd keeps" in ends(call("bench", "memory", "small", "--check"), 1)


# ---- times


def made_up(*, loop: float | None = None) -> list[record.Line]:
    """Two processes: without warm-ups steps of 30 and 20 ms, with one warm-up of 25 ms steps of 10 and 20 ms."""
    settings = TransformerSettings(size=TINY)
    found: list[record.Line] = [TransformerLine(**HEAD, settings=settings, warmups=(0, 1))]
    for warmup, steps in ((0, (30, 20)), (1, (25, 10, 20))):
        found.append(ProcessLine(warmup=warmup, device="cpu", threads=1))
        for place, ms in enumerate(steps):
            loop_ns, forward = int(loop * ms * MS) if loop is not None else None, ms * MS // 5
            ns: dict[str, Any] = {"forward_ns": forward, "backward_ns": 4 * forward, "loop_ns": loop_ns}
            found.append(StepLine(warmup=warmup, step=place - warmup, **ns))
        found.append(EndLine(warmup=warmup, peak=1 << 30, loss=1.0))
    return found


def test_warm_ups_do_not_count() -> None:
    without, with_one = views.arms(made_up())
    steps = [arm.ms["step"] for arm in (without, with_one)]
    assert [(ms.count, ms.mean, ms.max) for ms in steps] == [(2, 25.0, 30.0), (2, 15.0, 20.0)]
    view = views.view(made_up())
    assert view is not None
    assert view.verdict.endswith("with 0 warm-ups the mean step is 1.67 times that with 1")
    assert view.grids[-1].rows[0] == ("0 warm-ups", "25.0", "7.07", "20.0", "30.0", "25.0", "30.0", "1.667")


def test_rates_are_those_of_the_median() -> None:
    lines = made_up()
    head = lines[0]
    assert isinstance(head, TransformerLine)
    grid = views.times_grid(head, views.arms(lines)[-1])
    # 48 tokens in 3 ms forward, 12 ms backward, 15 ms together
    assert [row[-2] for row in grid.rows] == ["16,000", "4,000", "3,200"]
    assert grid.notes == ("1 warm-up before 2 steps that count, the first 25.0 ms; at most 1.0 GiB of memory",)


@pytest.mark.parametrize(("loop", "word"), [(1.02, "PASS"), (1.05, "FAIL"), (0.95, "FAIL")])
def test_a_step_that_differs_from_the_independent_loop_fails(loop: float, word: str) -> None:
    ((name, text),) = views.check_pairs(views.arms(made_up(loop=loop)))
    assert (name, text.split()[0]) == ("check", word)
    ((_, busy),) = views.check_pairs(views.arms(made_up(loop=loop)), "others were busy")
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


@pytest.mark.parametrize(("device", "wanted"), [("cpu", []), ("cuda", []), ("cuda:1", [1])])
def test_the_given_gpu_is_timed(device: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)

    def stop(settings: TransformerSettings) -> None:
        raise KeyboardInterrupt  # the next statement needs that device

    monkeypatch.setattr(measure, "Stepper", stop)
    with pytest.raises(KeyboardInterrupt):
        next(measure.process_lines(TransformerSettings(size=TINY, device=device, warmup_steps=0, num_steps=1)))
    assert chosen == wanted


@pytest.mark.parametrize("forward_only", [False, True])
def test_the_independent_loop_calls_nothing_of_the_stepper(forward_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(TransformerSettings(size=TINY, forward_only=forward_only))

    def refuse(*arguments: object) -> None:
        raise AssertionError("the loop is not independent")

    for name in ("forward", "backward", "timed"):
        monkeypatch.setattr(Stepper, name, refuse)
    monkeypatch.setattr("ktverify.system.timing.Clock.time", refuse)
    assert stepper.loop() > 0
    assert (stepper.model.embedding.weight.grad is None) == forward_only


@pytest.mark.parametrize("forward_only", [False, True])
def test_what_does_not_fit_is_refused_with_what_it_needs(monkeypatch: pytest.MonkeyPatch, forward_only: bool) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 8 << 30)
    with pytest.raises(MemoryError, match=r"2\.7b needs .* GiB for forward.* 8\.0 GiB are free on cpu") as caught:
        measure.check_fits(TransformerSettings(size=presets()["2.7b"], forward_only=forward_only))
    assert ("--forward_only" in str(caught.value)) is not forward_only
    measure.check_fits(TransformerSettings(size=presets()["small"], forward_only=forward_only))


def test_the_least_memory_contains_the_saved_tensors() -> None:
    for size in presets().values():
        whole = memory.step_memory(size).all
        kept = whole.parameter_bytes + whole.gradient_bytes + whole.activation_bytes
        assert memory.timing_bytes(size, forward_only=False) > kept
        assert memory.timing_bytes(size, forward_only=True) > whole.parameter_bytes


def test_the_last_words_of_a_dead_process_are_reported() -> None:
    with pytest.raises(RuntimeError, match=r"the measuring process ended with 1: RuntimeError: .*device type.*: tpus"):
        list(process.lines_of(measure.__name__, TransformerSettings(size=TINY, device="tpus")))


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
        assert module == measure.__name__
        asked.append(settings.warmup_steps)
        found = lines[min(1, settings.warmup_steps)]
        return [line.model_copy(update={"warmup": settings.warmup_steps}).model_dump_json() for line in found]

    monkeypatch.setattr(process, "lines_of", lines_of)
    arguments = ("bench", "transformer", *SIZES, "--warmup-study", "--forward_only", "--out", str(tmp_path / "run"))
    text = ends(call(*arguments), 0)
    assert asked == [0, 1, 2, 5]
    assert [line.split()[0] for line in text.splitlines() if re.match(r"\d warm-ups? ", line)] == list("0125")
