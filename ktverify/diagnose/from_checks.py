"""The cause that a failing check of the contract suggests, or the one found on the tensors that the check judged.

The checks are those of ktverify.checks.registry. They run in this process, one after the other, until one fails.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ktverify.checks.altered_inputs import with_case
from ktverify.checks.check import Check
from ktverify.checks.registry import find, of_any_engine, run
from ktverify.checks.target import Target
from ktverify.diagnose.drift import drift
from ktverify.diagnose.evidence import Evidence, Explanation, certain
from ktverify.diagnose.search import explain, one_thread
from ktverify.errors import GateFailed
from ktverify.spec.cases import Case, flops

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


def on_case(case: Case, tp: int) -> list[Check]:
    """The checks of what can make `case` fail although every formula is right: writes, repeats, threads, addresses."""
    names = ("nothing_is_written", "repeats", "threads", "odd_addresses")
    return [replace(find(f"behaviour/{name}"), case=case, arguments={}, tp=(tp,)) for name in names]


def first_failure(target: Target, asked: Sequence[Check], until: float) -> tuple[Explanation | None, int]:
    """(what the first failing check shows, how many ran). No check begins after `until`, a time of time.monotonic."""
    with one_thread():
        for number, check in enumerate(asked):
            if time.monotonic() > until:
                return None, number
            found = failure_of(check, target)
            if found is not None:
                return found, number + 1
    return None, len(asked)


def failure_of(check: Check, target: Target) -> Explanation | None:
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
        found = drift(target)
        if found is not None:
            return found
    more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
    return certain(suggested, f"{where}: {lines[0]}{more}" if lines else where)
