"""How long a layer takes: measured in a process that nothing else computes beside, on results that were checked."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktverify.checks import isas
from ktverify.checks.altered_inputs import changed, rows_of
from ktverify.checks.judging import expect_forms
from ktverify.checks.problem import LiveOracle
from ktverify.checks.target import Target, expect
from ktverify.engines.registry import NATIVE
from ktverify.engines.run import run_layer
from ktverify.errors import NotPassed
from ktverify.judge import gates, metrics
from ktverify.runs.record import LatencyRecord
from ktverify.spec.cases import Case, flops
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT, TOKEN_TENSORS
from ktverify.system.limits import processors
from ktverify.system.machine import read_machine
from ktverify.system.plausible import Ceilings, Work, cache_bytes
from ktverify.system.timing import time_rounds

WARMUP, ITERATIONS = 5, 20
WHATS = ("forward", "forward_backward")
# bytes: a smaller memory than the caches is read faster, and only makes the ceiling more cautious; seconds
_READ, _MULTIPLY_S = 1 << 27, 0.01


@dataclass(frozen=True)
class LatencySamples:
    """samples_ms: wall times of ITERATIONS calls in order, after WARMUP uncounted calls; bytes: see `measure`.

    doubt: why the shortest cannot be true, "" where it may be."""

    what: str
    tp: int
    samples_ms: tuple[float, ...]
    bytes: int
    doubt: str = ""


def environment() -> dict[str, str]:
    """What a timing process needs besides: all processors, also for an engine that computes with torch's threads."""
    return {"OMP_NUM_THREADS": str(processors())}


def measure(target: Target, case: Case, degrees: Sequence[int]) -> tuple[list[LatencySamples], str]:
    """Times of forward, and of forward and backward together, at each tensor parallel degree, with all processors.

    Each round has the tokens in another order, so that an engine which keeps earlier results has none of this call. The
    results of the last timed calls are compared with the oracle, so that no time of a wrong result is reported.
    `bytes` is the traffic that cannot be avoided: the weights of the experts that were reached, once per direction.
    Returns the timings, and the engine's reason where it declares that it cannot do a degree: that one and later ones
    are left out.
    """
    inputs = make_inputs(case)
    spots = _spots(inputs)
    weights = len(inputs.active) * 3 * case.hidden * case.intermediate * inputs.gate_proj.element_size()
    timings: list[LatencySamples] = []
    for tp in degrees:
        try:
            timings += _measure_degree(replace(target, tp=tp), inputs, spots, weights)
        except NotImplementedError as error:
            return timings, str(error)
    return timings, ""


def _measure_degree(target: Target, inputs: Inputs, spots: list[_Spot], weights: int) -> list[LatencySamples]:
    layer, tokens = target.layer(inputs.case, inputs, threads=processors()), inputs.case.qlen
    # inputs of the present round, and the place of each of its tokens in `inputs`
    now, order = inputs, torch.arange(tokens)
    output: list[Tensor] = []
    found: dict[str, Tensor] = {}
    ceilings: list[tuple[float, float]] = []
    draw = random.SystemRandom()
    isa = next(isa.name or "" for isa in isas.planned(NATIVE) if not isa.emulated)

    def another_order() -> None:
        nonlocal now, order
        order = torch.tensor(draw.sample(range(tokens), tokens))
        now = rows_of(inputs, order)
        ceilings.append(_ceilings(isa))

    def forward() -> None:
        output[:] = [layer.forward_sft(now.hidden_states, now.expert_ids, now.weights, save_for_backward=False)]

    def both() -> None:
        found.update(run_layer(layer, now))

    samples: dict[str, list[float]] = {what: [] for what in WHATS}
    calls = dict(zip(WHATS, (forward, both), strict=True))
    for number, taken in time_rounds(calls, warmup=WARMUP, repeats=ITERATIONS, prepare=another_order):
        for what, ns in taken.items() if number >= 0 else ():
            samples[what].append(ns * 1e-6)
    back = order.argsort()
    for results in ({OUTPUT: output[0]}, found):
        expect_forms(target, "the timed calls", results, now)
        right = {name: tensor[back] if name in TOKEN_TENSORS else tensor for name, tensor in results.items()}
        for spot in spots:
            spot.judge(inputs.case, right)
    read, multiply = map(max, zip(*ceilings, strict=True))
    machine = Ceilings(read, multiply, isa, cache_bytes(), read_machine().flags)
    return [
        LatencySamples(
            what,
            target.tp,
            tuple(samples[what]),
            reads * weights,
            machine.too_fast(min(samples[what]), Work(reads * weights, flops(inputs.case, backward=reads > 1))),
        )
        for what, reads in zip(WHATS, (1, 2), strict=True)
    ]


def _ceilings(isa: str) -> tuple[float, float]:
    """What the machine reaches now, with all processors: bytes per second, operations per second on `isa`."""
    import ktverify._native as native

    return native.read_rate(processors(), _READ, 1), native.multiply_rate(isa, processors(), _MULTIPLY_S)


@dataclass(frozen=True)
class _Spot:
    """A part of the results that is judged, because the whole oracle takes a minute: names, rows or one expert, and the
    right answer of inputs that have nothing else."""

    names: tuple[str, ...]
    part: slice | int
    oracle: LiveOracle

    def judge(self, case: Case, found: Mapping[str, Tensor]) -> None:
        lines = []
        for name in (name for name in self.names if name in found):
            expected = self.oracle.tensors[name]
            difference = metrics.compare(found[name][self.part], expected[self.part])
            # of one expert alone, every other expert's gradients are zero, and the error of the whole is the expert's
            judgement = gates.judge(case, name, difference, self.oracle.rounding[name])
            if judgement.exceeded:
                lines.append(judgement.line.partition("\n")[0])
        expect(not lines, "\n".join(["the timed calls gave wrong results", *lines]))


def _spots(inputs: Inputs) -> list[_Spot]:
    """Four tokens' rows, and one expert's gradients."""
    few = slice(0, 4)
    expert = inputs.active[-1]
    alone = changed(inputs, expert_ids=torch.where(inputs.expert_ids == expert, inputs.expert_ids, -1))
    return [
        _Spot((OUTPUT, GRAD_INPUT, GRAD_WEIGHTS), few, LiveOracle.of(rows_of(inputs, few))),
        _Spot(GRAD_NAMES, expert, LiveOracle.of(alone)),
    ]


def record_of(timing: LatencySamples, engine: str, case: Case, *, isa: str, message: str) -> LatencyRecord:
    """The record of one timing whose results were right: MISTRUSTED where the machine cannot be so fast."""
    return LatencyRecord(
        family="latency",
        engine=engine,
        isa=isa,
        verdict="MISTRUSTED" if timing.doubt else "PASS",
        message=f"MISTRUSTED {timing.what} {timing.doubt}" if timing.doubt else message,
        case=case.id,
        what=timing.what,
        threads=processors(),
        tp=timing.tp,
        samples_ms=timing.samples_ms,
        warmup=WARMUP,
        tokens=case.qlen,
        flops=flops(case, backward=timing.what != "forward"),
        bytes=timing.bytes,
    )


def check_samples(timings: list[LatencySamples]) -> None:
    """AssertionError unless every timing has ITERATIONS positive, finite samples. How long they are is not judged."""
    for timing in timings:
        count = len(timing.samples_ms)
        expect(count == ITERATIONS, f"{timing.what} has {count} samples, must have {ITERATIONS}")
        odd = [sample for sample in timing.samples_ms if not (math.isfinite(sample) and sample > 0)]
        expect(not odd, f"{timing.what} has samples that are no times: {odd}")


def expect_plausible(timings: Sequence[LatencySamples]) -> None:
    """NotPassed with the line of every time that is shorter than the machine allows."""
    doubts = [f"MISTRUSTED {timing.what} tp={timing.tp} {timing.doubt}" for timing in timings if timing.doubt]
    if doubts:
        raise NotPassed("\n".join(doubts))
