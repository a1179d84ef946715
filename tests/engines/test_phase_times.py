"""Stage times: they add up, they cost no bit, and they show as few stages as the engine promises."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ktverify.bench.shapes import backward_work, forward_work
from ktverify.checks.target import expect_same_bits
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.native.phase_times import WAIT, StageTimes
from ktverify.engines.run import build_layer, run_layer
from ktverify.spec.cases import Case, flops
from ktverify.spec.inputs import make_inputs

CASE = Case.parse("E=6,k=2,H=256,I=192,T=70,r=8,alpha=16")
MOST_STAGES = {"forward": 4, "backward": 5}
FORWARD = {"routing", "pack_input", "gate_up_lora_a", "gate_up", "activation", "down_lora_a", "down", "merge"}
BACKWARD = {
    "scatter", "down_lora_b", "down_grad", "activation_grad", "gate_up_lora_b", "gate_up_grad", "gate_up_lora_grad",
    "down_lora_grad", "merge",
}  # fmt: skip


def _recorded(tp: int = 1, method: str = "AMXBF16_SFT") -> tuple[StageTimes, StageTimes]:
    """Stage times of a forward and a backward."""
    inputs = make_inputs(CASE)
    layer = build_layer(KTMoEWrapper, CASE, inputs, threads=2, tp=tp, method=method)
    layer.record_stages()
    layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights)
    forward = layer.stage_times()
    layer.backward(inputs.grad_output)
    return forward, layer.stage_times()


@pytest.mark.parametrize("tp", [1, 2])
def test_phases_of_every_worker_add_up_to_the_call(tp: int) -> None:
    for times in _recorded(tp):
        for worker in range(times.workers):
            assert sum(phase.ns[worker] for phase in times.phases) == times.wall_ns
            assert 0 < times.busy_ns(worker) <= times.wall_ns
        assert sum(phase.wall_ns for phase in times.phases) == pytest.approx(times.wall_ns)


def test_stages_are_named_and_few_and_follow_each_other() -> None:
    forward, backward = _recorded()
    assert {phase.name for phase in forward.phases} >= FORWARD
    assert {phase.name for phase in backward.phases} >= BACKWARD
    assert (forward.direction, forward.rows, backward.direction) == ("forward", CASE.qlen, "backward")
    assert backward.phases[-1].name == WAIT
    for times in (forward, backward):
        assert 0 < times.stages <= MOST_STAGES[times.direction]
        for spans in times.spans:
            assert [span.stage for span in spans] == list(range(times.stages))
            ends = [0, *(span.end for span in spans)]
            assert all(end <= span.begin <= span.work_end <= span.end for end, span in zip(ends, spans, strict=False))
            assert ends[-1] <= times.wall_ns


def test_operations_are_those_of_the_case() -> None:
    forward, backward = _recorded()
    rows = CASE.qlen * CASE.top_k
    merging = 2 * rows * CASE.hidden
    assert sum(phase.flops for phase in forward.phases) - merging == pytest.approx(flops(CASE))
    both = flops(CASE, backward=True)
    assert sum(phase.flops for phase in backward.phases) - merging / 2 == pytest.approx(both - flops(CASE))
    # at least what the bench's roofline counts: the base weights, once
    for times, work in ((forward, forward_work(CASE, 6)), (backward, backward_work(CASE, 6))):
        assert sum(phase.bytes for phase in times.phases) >= work.bytes


def test_recording_changes_no_bit() -> None:
    inputs = make_inputs(CASE)
    layer = build_layer(KTMoEWrapper, CASE, inputs, threads=2)
    plain = run_layer(layer, inputs)
    layer.record_stages()
    recorded = run_layer(layer, inputs)
    expect_same_bits("with and without stage times", plain, recorded)
    times = layer.stage_times()
    layer.record_stages(False)
    run_layer(layer, inputs)
    assert layer.stage_times() == times, "calls that were not to be recorded were"


def test_only_a_recorded_call_has_times_and_packing_weights_is_a_phase() -> None:
    inputs = make_inputs(CASE)
    layer = build_layer(KTMoEWrapper, CASE, inputs, threads=2)
    with pytest.raises(RuntimeError, match="record_stages"):
        layer.stage_times()
    layer.record_stages()
    names = []
    for _ in range(2):
        layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=False)
        names.append({phase.name for phase in layer.stage_times().phases})
    assert "pack_weights" in names[0]
    assert "pack_weights" not in names[1]


def test_survive_json() -> None:
    for times in _recorded(method="AMXBF16_SFT_SkipLoRA"):
        assert StageTimes.of(json.loads(json.dumps(dataclasses.asdict(times)))) == times
