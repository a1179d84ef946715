"""The verdict of a plan, and the measurement that it is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ktverify.bench.plan import measure, steps
from ktverify.bench.plan.memory import Load, layer_use
from ktverify.bench.plan.plan import plan
from ktverify.engines.argument_checks import LayerSpec
from ktverify.training.moe_model import MoeModel
from tests.support.plans import GPU, ONE, SMALL, TWO

# ---- the verdict


def test_the_fastest_split_that_fits_is_named() -> None:
    load = Load(4096, 8, "bf16")
    found = plan(SMALL, replace(TWO, network=1e12, local=1e12), load)
    assert [one.split.name for one in found.chosen] == [
        "one process, one node", "TP of 2 nodes", "EP of 2 machines", "EP of 4 nodes",
    ]  # fmt: skip
    assert all(one.fits for one in found.chosen)
    assert found.fastest is not None
    assert found.fastest.split.name.startswith("EP of ")
    slow = plan(SMALL, replace(TWO, network=1e3, local=1e3), load)
    assert slow.fastest is not None
    assert slow.fastest.split.name == "TP of 2 nodes"
    assert slow.verdict.startswith("bf16: TP of 2 nodes is the fastest of 4 that fit, of 4: at most ")
    least = found.chosen[2].node
    tight = plan(SMALL, replace(TWO, memory=2 * least), load)
    assert [one.fits for one in tight.chosen] == [False, False, True, True]
    none = plan(SMALL, replace(TWO, memory=least), load)
    assert none.fastest is None
    assert none.verdict.startswith("bf16: no split fits; EP of 4 nodes takes least, ")


def test_the_number_of_experts_on_a_gpu_is_the_best_that_fits() -> None:
    load = Load(4096, 8, "bf16")
    every = plan(SMALL, GPU, load).chosen[-1]
    assert every.split.gpu_experts == 8
    assert every.fits
    of_three = plan(SMALL, GPU, load, gpu_experts=3).chosen[-1]
    few = plan(SMALL, replace(GPU, gpu_memory=of_three.gpu), load).chosen[-1]
    assert few.split.name == "hybrid, 3 on a GPU"
    assert few.fits
    # where copies to the GPU take longer than the engine, one expert is best
    assert plan(SMALL, replace(GPU, gpu_link=1e6), load).chosen[-1].split.gpu_experts == 1
    with pytest.raises(ValueError, match="--gpu-experts is 9; it takes 1 to 8"):
        plan(SMALL, GPU, load, gpu_experts=9)


# ---- the measurement


def test_a_prediction_is_made_of_the_calibration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TOKENS", (1, 8))
    monkeypatch.setattr(measure, "_OTHER_DATA", 1 << 12)
    request = measure.request_of(replace(SMALL, hidden=128, intermediate=64), Load(24, 8, "mxfp4"), 2)
    lines = list(measure.lines(request))
    assert sum(isinstance(line, measure.PlanCeilingLine) for line in lines) == 2
    # as if every call had taken twice its roofline's time
    limits = [line for line in lines if isinstance(line, measure.PlanCeilingLine)]
    read, multiply = max(line.read for line in limits), max(line.multiply for line in limits)
    doubled: list[Any] = list(limits)
    for line in lines:
        if isinstance(line, measure.Sample):
            model = measure.calibration_of(request)[0] if line.layer < 0 else measure._model(request)
            load = Load(line.tokens, 8, "mxfp4")
            work = steps.works_of(model, load, line.active * layer_use(model, ONE, load).expert)[line.direction]
            doubled.append(line.model_copy(update={"ns": round(2e9 * work.seconds(read, multiply))}))
    found = measure.measured(request, doubled)
    for points in found.efficiency.points.values():
        assert [share for _, share in points] == pytest.approx([0.5, 0.5], rel=1e-3)
    assert found.predicted == pytest.approx(2 * found.bound, rel=1e-3)
    assert found.predicted == pytest.approx(found.seconds, rel=0.05)
    assert found.passed
    slower = [line.model_copy(update={"ns": 3 * line.ns}) if line.kind == "call" and line.layer >= 0 else line
              for line in doubled]  # fmt: skip
    again = measure.measured(request, slower)
    assert again.predicted == found.predicted
    assert not again.passed


def test_a_large_layer_is_measured_with_fewer_experts_of_as_many_rows() -> None:
    model, load = MoeModel("deepseek_v3", 58, 256, 8, 7168, 2048, 0, ()), Load(2048, 8, "bf16")
    request = measure.request_of(model, load, 3)
    assert request.experts * layer_use(model, ONE, load).expert <= 1 << 30
    assert request.tokens * 8 / request.experts == pytest.approx(2048 * 8 / 256, rel=0.02)
    small = measure.request_of(SMALL, Load(16, 8, "bf16"), 3)
    assert (small.layers, small.experts, small.tokens) == (2, 8, 16)
    tiny = replace(SMALL, hidden=32, intermediate=32)
    assert measure.request_of(tiny, Load(10**5, 8, "bf16"), 3).tokens == LayerSpec.chunked_prefill_size
