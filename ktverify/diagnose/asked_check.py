"""What one check of the contract shows about an engine, in the process that it runs in.

A failing check suggests a cause. Where it judged the tensors of a whole call, the hypotheses are tested on them, and
one that explains them overrules the suggestion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ktverify.checks.altered_inputs import with_case
from ktverify.checks.causes import Cause
from ktverify.checks.check import Check
from ktverify.checks.target import Target, same_bits
from ktverify.diagnose.asking import Fault
from ktverify.diagnose.evidence import Evidence, Explanation, stated
from ktverify.diagnose.hypotheses.operands import stale_since
from ktverify.diagnose.search import Family, explain, one_thread
from ktverify.engines.run import run_layer
from ktverify.errors import GateFailed
from ktverify.isolation.calls import ENGINE_EXCEPTIONS
from ktverify.judge.metrics import compare
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS

_CLEAR = 0.9  # share of the error above which a hypothesis overrules the cause that a check suggests
# they compare the tensors of a whole case, so the hypotheses know the cause better
_NUMBERS = ("forward", "backward", "edge", "exact")
_DRIFT_CASE = Case.parse("E=6,k=2,H=72,I=40,T=40,r=8,alpha=16,lora=float32")
_DRIFT_STEPS = (1, 2, 3, 4, 6, 10, 20, 35, 50)  # updates after which both layers are compared


@dataclass(frozen=True)
class Shown:
    """What a check shows. finding: with the id of the check in its text.

    about: the same without the id, for comparison with other findings: a hypothesis that fits, or what the engine did.
    gates: those that were exceeded. fault: what the engine did instead of computing.
    """

    finding: Explanation
    about: Explanation | None = None
    gates: frozenset[str] = frozenset()
    fault: Fault | None = None


def of_fault(check: Check, fault: Fault) -> Shown:
    """What a check shows in which the engine did not compute."""
    text = fault.text if fault.verdict == "UNSUPPORTED" else f"{check.id}: {fault.text}"
    cause = check.cause if fault.raised else Cause.CRASH
    return Shown(stated(cause, text, *fault.words), stated(cause, fault.text), fault=fault)


def shown_by(check: Check, target: Target, first: Sequence[Family] = ()) -> Shown | None:
    """What a check shows about the engine; None if it passes, or cannot decide anything about this engine.

    first: the families of hypotheses to test before all others.
    """
    with one_thread():
        try:
            check.every_tp(target)
        except GateFailed as failed:
            return _explained(check, failed, target, first)
        except AssertionError:
            # a precondition of the check
            return None
        except ENGINE_EXCEPTIONS as error:
            return of_fault(check, Fault.of(error))
    return None


def _explained(check: Check, failed: GateFailed, target: Target, first: Sequence[Family]) -> Shown:
    """The hypothesis that fits the tensors of the failed call; otherwise what the check itself suggests."""
    suggested = failed.cause or check.cause
    gates = frozenset(gate for gate, _ in failed.exceeded)
    what, *lines = str(failed).splitlines()
    where = check.id if check.case is not None and check.case.id in what else f"{check.id}: {what}"
    if failed.result is not None:
        given, tp = failed.result.problem.inputs, failed.result.tp
        # a check may judge some tokens of its case
        inputs = with_case(given, qlen=len(given.hidden_states))
        best = explain(Evidence.of(inputs, failed.result.actual, replace(target, tp=tp)), first).first
        numbers = check.kind in _NUMBERS
        if best is not None and (numbers or best.cause is suggested or best.share > _CLEAR):
            where += f" at TP {tp}" if tp != 1 else ""
            finding = replace(best, text=f"{where}: {best.text}", complete=True)
            return Shown(finding, best, gates)
    if "loss" in gates:
        found = _drift(target)
        if found is not None:
            return Shown(found, found, gates)
    more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
    return Shown(stated(suggested, f"{where}: {lines[0]}{more}" if lines else where), gates=gates)


def _drift(target: Target) -> Explanation | None:
    """Where a trained layer departs from a new one with the same parameters: from some update on, or ever more.

    Takes fifty small updates of fp32 LoRA; None if the layer has the bits of a new one after each of _DRIFT_STEPS.
    """
    inputs = make_inputs(_DRIFT_CASE)
    first_values = inputs.lora
    layer = target.layer(_DRIFT_CASE, inputs)
    run_layer(layer, inputs)
    draw = torch.Generator().manual_seed(7)
    apart: list[tuple[int, float]] = []
    for step in range(1, _DRIFT_STEPS[-1] + 1):
        before = inputs.lora
        after = {n: t + 0.02 * t.std() * torch.randn(t.shape, generator=draw) for n, t in before.items()}
        inputs = replace(inputs, lora=after)
        with torch.no_grad():
            for name, tensor in after.items():
                getattr(layer, name).copy_(tensor)
        layer.update_lora_weights()
        if step in _DRIFT_STEPS:
            found, fresh = run_layer(layer, inputs), target.run(_DRIFT_CASE, inputs)
            odd = [name for name in ALL_TENSORS if not same_bits(fresh[name], found[name])]
            distance = max((compare(found[name], fresh[name].double()).rel_l2 for name in odd), default=0.0)
            apart += [(step, distance)] if distance > 0 else []
    if not apart:
        return None
    first, last = apart[0], apart[-1]
    numbers = ", ".join(f"{distance:.1e} after {step}" for step, distance in (first, apart[len(apart) // 2], last))
    # an old value is farther away after every update, as a coarse sum is: only its formula tells both apart
    evidence = Evidence.of(inputs, run_layer(layer, inputs), target)
    for when, values in (("the last", before), ("the first", first_values)):
        old = next((each for each in stale_since(evidence, values, when) if each.share > _CLEAR), None)
        if old is not None:
            return stated(old.cause, f"from update {first[0]} on: {old.line} (rel_l2 {numbers})")
    slope = math.log(last[1] / first[1]) / math.log(last[0] / first[0]) if len(apart) > 2 else 0.0
    # present from the start and growing: a drift; one that appears and stays: an old value
    if slope > 0.3 and first[0] == _DRIFT_STEPS[0]:
        said = f"the error grows with the updates, about as steps^{slope:.1f}: rel_l2 {numbers}"
        return stated(Cause.ACCUMULATION_TYPE, f"{said}; a running sum of a coarser type than fp32 does that")
    said = f"{', '.join(evidence.failing)} are wrong after update {_DRIFT_STEPS[-1]}"
    return stated(Cause.ACCUMULATION_TYPE, f"from update {first[0]} on: {said} (rel_l2 {numbers})")
