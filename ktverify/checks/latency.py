"""How long a layer takes: measured in a process that nothing else computes beside, on results that were checked."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ktverify.checks.target import Target, expect
from ktverify.engines.run import run_layer
from ktverify.judge import gates, metrics, reference
from ktverify.judge.bf16_baseline import peer_error
from ktverify.runs.record import LatencyRecord
from ktverify.spec.cases import Case, flops
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT

WARMUP, ITERATIONS = 5, 20
WHATS = ("forward", "forward_backward")


@dataclass(frozen=True)
class LatencySamples:
    """samples_ms: wall times of ITERATIONS calls in order, after WARMUP calls that do not count; bytes: see below."""

    what: str
    samples_ms: tuple[float, ...]
    bytes: int


def processors() -> int:
    return len(os.sched_getaffinity(0))


def environment() -> dict[str, str]:
    """What a timing process needs besides: all processors, also for an engine that computes with torch's threads."""
    return {"OMP_NUM_THREADS": str(processors())}


def measure(target: Target, case: Case, tp: int) -> list[LatencySamples]:
    """Times of forward, and of forward and backward together, at tensor-parallel degree `tp` with all processors.

    What the last timed calls gave is compared with the oracle, so that no time of a wrong result is ever reported.
    `bytes` is the traffic that cannot be avoided: the weights of the experts that were reached, once per direction.
    """
    inputs = make_inputs(case)
    layer = target.layer(case, inputs, tp=tp, threads=processors())
    found: dict[str, Tensor] = {}

    def forward() -> None:
        found[OUTPUT] = layer.forward_sft(
            inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=False
        )

    def both() -> None:
        found.update(run_layer(layer, inputs))

    weights = len(inputs.active) * 3 * case.hidden * case.intermediate * inputs.gate_proj.element_size()
    timings = []
    for what, call, reads in ((WHATS[0], forward, 1), (WHATS[1], both, 2)):
        timings.append(LatencySamples(what, _samples(call), reads * weights))
        if what == "forward":
            _check(case, inputs, {OUTPUT: found[OUTPUT]})
    _check(case, inputs, found)
    return timings


def _samples(call: Callable[[], None]) -> tuple[float, ...]:
    for _ in range(WARMUP):
        call()
    samples = []
    for _ in range(ITERATIONS):
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) * 1e-6)
    return tuple(samples)


def _check(case: Case, inputs: Inputs, found: dict[str, Tensor]) -> None:
    """AssertionError unless four tokens' rows and one expert's gradients are right: the whole oracle takes a minute."""
    few = copy.copy(inputs)
    rows = slice(0, 4)
    few.hidden_states, few.grad_output = inputs.hidden_states[rows], inputs.grad_output[rows]
    few.expert_ids, few.weights = inputs.expert_ids[rows], inputs.weights[rows]
    by_row = {name: found[name][rows] for name in (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS) if name in found}
    _judge(case, few, by_row)
    if GRAD_INPUT in found:
        expert = inputs.active[-1]
        one = copy.copy(inputs)
        one.expert_ids = torch.where(inputs.expert_ids == expert, inputs.expert_ids, -1)
        _judge(case, one, {name: found[name][expert] for name in GRAD_NAMES}, expert)


def _judge(case: Case, inputs: Inputs, found: dict[str, Tensor], expert: int | None = None) -> None:
    oracle = reference.forward_backward(inputs)
    # of one expert alone, every other expert's gradients are zero, and the error of the whole is the expert's
    peer = peer_error(inputs, oracle)
    lines = []
    for name, tensor in found.items():
        expected = oracle[name] if expert is None else oracle[name][expert]
        judgement = gates.judge(case, name, metrics.compare(tensor, expected), peer[name])
        if judgement.verdict is not gates.Verdict.PASS:
            lines.append(judgement.line.partition("\n")[0])
    expect(not lines, "\n".join(["the timed calls gave wrong results", *lines]))


def record_of(timing: LatencySamples, engine: str, case: Case, *, isa: str, tp: int, message: str) -> LatencyRecord:
    """The record of one timing whose results were right."""
    return LatencyRecord(
        family="latency",
        engine=engine,
        isa=isa,
        verdict="PASS",
        message=message,
        case=case.id,
        what=timing.what,
        threads=processors(),
        tp=tp,
        samples_ms=timing.samples_ms,
        warmup=WARMUP,
        tokens=case.qlen,
        flops=flops(case, backward=timing.what != "forward"),
        bytes=timing.bytes,
    )


def check_samples(timings: list[LatencySamples]) -> None:
    """AssertionError unless every timing has ITERATIONS positive, finite samples. No time is judged here."""
    for timing in timings:
        count = len(timing.samples_ms)
        expect(count == ITERATIONS, f"{timing.what} has {count} samples, must have {ITERATIONS}")
        odd = [sample for sample in timing.samples_ms if not (math.isfinite(sample) and sample > 0)]
        expect(not odd, f"{timing.what} has samples that are no times: {odd}")
