"""Diagnose an engine on a case: the tensors first; where they do not explain enough, the checks of the contract.

The checks are those of ktverify.checks.registry. They run in this process, one after the other, until one fails.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from ktverify.checks.altered_inputs import with_case
from ktverify.checks.causes import Cause
from ktverify.checks.check import Check
from ktverify.checks.registry import find, of_any_engine, run
from ktverify.checks.target import Target, same_bits
from ktverify.diagnose.evidence import Evidence, Explanation, Tensors, certain
from ktverify.diagnose.hypotheses.operands import stale_since
from ktverify.diagnose.search import Diagnosis, explain, one_thread, ranked, reduced
from ktverify.engines.run import run_layer
from ktverify.errors import GateFailed
from ktverify.judge.metrics import compare
from ktverify.spec.cases import Case, flops
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS

SURE = 0.95  # share of the error above which an explanation needs no further calls
_TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")
_SMALL = 10**8  # floating-point operations of forward and backward, up to which a case is quick
_CLEAR = 0.9  # share of the error above which a hypothesis overrules the cause that a check suggests
# One defect can fail several checks. A check that suggests the right cause of a defect runs before those that suggest a
# more general one; what takes long (trainings, new processes) runs last. Ties keep the order of the registry.
_FIRST = (
    "behaviour/nothing_is_written*",
    "behaviour/repeats",
    "behaviour/threads",
    "behaviour/odd_addresses",
    "behaviour/strides",
    "behaviour/idle_experts",
    "behaviour/varying_tokens",
    "behaviour/reload",
    "behaviour/two_layers",
    "behaviour/outstanding_forwards",
    "training/update*",
    "processes/update_while_forward_waits",
    "behaviour/*",
    "tp/*",
    "refusals/*",
    "tp_constraint/*",
    "edge/*",
    "exact/*",
)
_LAST = ("training/*", "processes/*")
# they compare the tensors of a whole case, so the hypotheses know the cause better
_NUMBERS = ("forward", "backward", "edge", "exact")
_DRIFT_CASE = Case.parse("E=6,k=2,H=72,I=40,T=40,r=8,alpha=16,lora=float32")
_DRIFT_STEPS = (1, 2, 3, 4, 6, 10, 20, 35, 50)  # updates after which both layers are compared


def diagnose(
    case: Case,
    target: Target,
    *,
    tensors: Sequence[str] | None = None,
    inputs: Inputs | None = None,
    actual: Tensors | None = None,
    run_checks: bool = True,
    seconds: float = 20.0,
) -> Diagnosis:
    """Find the cause of what is wrong with `target` on `case`; with `run_checks`, also of what the case does not show.

    tensors: examine only these. actual: ALL_TENSORS of the case, if the caller has them. run_checks=False makes no call
    beyond the case's own. seconds: after this time no further hypothesis or check is begun. Exceptions of the engine
    on the case itself are not caught.
    """
    until = time.monotonic() + seconds
    inputs, note = reduced(make_inputs(case) if inputs is None else inputs)
    if actual is None or note:
        # an engine may write to its inputs; the oracle needs them unchanged
        actual = target.run(case, replace(inputs, **{name: getattr(inputs, name).clone() for name in _TOKENS}))
    wanted = {name: tensor for name, tensor in actual.items() if name in (tensors or ALL_TENSORS)}
    diagnosis = explain(Evidence.of(inputs, wanted, target, seconds=seconds))
    notes = [note] if note else []
    if run_checks and not (diagnosis.first is not None and diagnosis.first.share > SURE):
        # the checks of the registry have cases and tensor parallel degrees of their own
        asked = _on_case(case, target.tp) if diagnosis.failing or target.tp != 1 else []
        asked += [] if diagnosis.failing else quick()
        found, tried = _first_failure(target, asked, until)
        diagnosis.tried += tried
        if found is None and tried < len(asked):
            notes.append(f"the time was up after {tried} of {len(asked)} checks")
        diagnosis.explanations = ranked([*diagnosis.explanations, *([found] if found else [])])
    diagnosis.note = "; ".join(notes)
    return diagnosis


def quick() -> list[Check]:
    """The checks with small cases that any engine can be asked, in the order that distinguishes causes best."""
    small = [each for each in of_any_engine() if each.case is None or flops(each.case, backward=True) <= _SMALL]
    return sorted(small, key=_place)


def _place(check: Check) -> tuple[int, str]:
    for place, pattern in enumerate(_FIRST):
        if fnmatchcase(check.id, pattern):
            return place, ""
    # forward and backward of a case share its inputs and its oracle
    last = any(fnmatchcase(check.id, pattern) for pattern in _LAST)
    return (len(_FIRST) + 1, "") if last else (len(_FIRST), check.name)


def _on_case(case: Case, tp: int) -> list[Check]:
    """The checks of what can make `case` fail although every formula is right: writes, repeats, threads, addresses."""
    names = ("nothing_is_written", "repeats", "threads", "odd_addresses")
    return [replace(find(f"behaviour/{name}"), case=case, arguments={}, tp=(tp,)) for name in names]


def _first_failure(target: Target, asked: Sequence[Check], until: float) -> tuple[Explanation | None, int]:
    """(what the first failing check shows, how many ran). No check begins after `until`, a time of time.monotonic."""
    with one_thread():
        for number, check in enumerate(asked):
            if time.monotonic() > until:
                return None, number
            found = _failure_of(check, target)
            if found is not None:
                return found, number + 1
    return None, len(asked)


def _failure_of(check: Check, target: Target) -> Explanation | None:
    """What a check shows about the engine; None if it passes, or cannot decide anything about this engine."""
    try:
        run(check, target)
    except GateFailed as failed:
        return _explained(check, failed, target)
    except (NotImplementedError, AssertionError):
        # declared by the engine, or a precondition of the check
        return None
    except Exception as error:
        return certain(check.cause, f"{check.id}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return None


def _explained(check: Check, failed: GateFailed, target: Target) -> Explanation:
    """The hypothesis that fits the tensors of the failed call; otherwise what the check itself suggests."""
    suggested = failed.cause or check.cause
    what, *lines = str(failed).splitlines()
    where = check.id if check.case is not None and check.case.id in what else f"{check.id}: {what}"
    if failed.result is not None:
        given, tp = failed.result.problem.inputs, failed.result.tp
        # a check may judge some tokens of its case
        inputs = with_case(given, qlen=len(given.hidden_states))
        best = explain(Evidence.of(inputs, failed.result.actual, replace(target, tp=tp))).first
        numbers = check.kind in _NUMBERS
        if best is not None and (numbers or best.cause is suggested or best.share > _CLEAR):
            where += f" at TP {tp}" if tp != 1 else ""
            cause = best.cause if numbers else suggested
            return replace(best, cause=cause, text=f"{where}: {best.text}", complete=True)
    if "loss" in dict(failed.exceeded):
        found = _drift(target)
        if found is not None:
            return found
    more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
    return certain(suggested, f"{where}: {lines[0]}{more}" if lines else where)


def _drift(target: Target) -> Explanation | None:
    """Where a trained layer departs from a new one with the same parameters: from some update on, or ever more.

    Takes fifty small updates of fp32 LoRA; None if the layer has the bits of a new one after each of _DRIFT_STEPS.
    """
    inputs = make_inputs(_DRIFT_CASE)
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
    slope = math.log(last[1] / first[1]) / math.log(last[0] / first[0]) if len(apart) > 2 else 0.0
    # present from the start and growing: a drift; one that appears and stays: an old value
    if slope > 0.3 and first[0] == _DRIFT_STEPS[0]:
        said = f"the error grows with the updates, about as steps^{slope:.1f}: rel_l2 {numbers}"
        return certain(Cause.ACCUMULATION_TYPE, f"{said}; a running sum of a coarser type than fp32 does that")
    evidence = Evidence.of(inputs, run_layer(layer, inputs), target)
    old = next((each for each in stale_since(evidence, before) if each.share > 0.5), None)
    said = old.line if old is not None else f"{', '.join(evidence.failing)} are wrong after update {_DRIFT_STEPS[-1]}"
    cause = old.cause if old is not None else Cause.ACCUMULATION_TYPE
    return certain(cause, f"from update {first[0]} on: {said} (rel_l2 {numbers})")
