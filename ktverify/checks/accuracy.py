"""A case through an engine, every tensor judged: what forward, backward, `repro` and `verify` run.

Input: a Target and a Case. Output: a Result, whose accuracy records every printer shows.
"""

from __future__ import annotations

import functools
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ktverify.checks.altered_inputs import TOKENS
from ktverify.checks.causes import cause_of
from ktverify.checks.check import Check, enter
from ktverify.checks.judging import BUDGET, NUMBERS, arguments_of, wrong_forms
from ktverify.checks.problem import Problem, Result
from ktverify.checks.repro_commands import isa_name, repro_command, verify_command
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.engines.run import METHOD, run_case
from ktverify.errors import EngineDied, EngineOutOfMemory, EngineRaised, GateFailed, NotPassed, Unsupported
from ktverify.isolation import hosted
from ktverify.isolation.calls import CONSTRUCTOR, ENGINE_EXCEPTIONS, IMPORT, CallLog, call_of
from ktverify.isolation.origin import describe
from ktverify.judge import golden
from ktverify.judge.gates import GateResult, Judgement, Verdict, judge
from ktverify.judge.metrics import compare
from ktverify.runs.record import AccuracyRecord, GateRecord, VerdictName, accuracy_record
from ktverify.spec import cases
from ktverify.spec.cases import Case, flops
from ktverify.spec.names import ALL_TENSORS, BACKWARD_TENSORS, GRAD_NAMES, OUTPUT

METHODS = (METHOD, f"{METHOD}_SkipLoRA")
# the tensors that each family judges
TENSORS: dict[str, tuple[str, ...]] = {"forward": (OUTPUT,), "backward": BACKWARD_TENSORS}
# most floating-point operations, forward and backward, of a case that is repeated with a secret seed
_SMALL = 10**9
# characters of an error that a record keeps
MESSAGE = 4000


def crash_or_raise(error: BaseException, method: str) -> Exception:
    """The exception to record as UNSUPPORTED, FAIL or CRASH, for what `method` of an engine raised.

    Raises it instead where it is not the engine's fault: a refusal by import or constructor, or too little memory.
    """
    if isinstance(error, NotImplementedError | EngineDied | GateFailed):
        return error
    refusal = method in ("", IMPORT, CONSTRUCTOR) and not isinstance(error, SystemExit)
    if isinstance(error, MemoryError) or refusal:
        raise error
    return EngineRaised(f"CRASH {describe(error, method)}")


def check_case(
    target: Target,
    case: Case,
    *,
    fresh: bool = False,
    backward: bool = True,
    tensors: Sequence[str] | None = None,
    problem: Problem | None = None,
) -> Result:
    """Run `case` on `target` and judge each of `tensors` (default: all that were computed).

    fresh: judge against the live oracle, also where there is a golden. problem: that of `case`, where the caller has it
    already. Raises ValueError for an unknown tensor or method, and what the engine's constructor raises. What its
    methods raise is a CRASH of the tensors that they did not give: an output is judged where the backward raises.
    An engine of the user's that passes a small case with its golden is also asked the case with a secret seed; where it
    is wrong there, the record is about that.
    """
    wanted = check_names(tensors, backward)
    if target.method not in METHODS:
        raise ValueError(f"method is {target.method!r}, it takes one of {', '.join(METHODS)}")
    if case.intermediate % target.tp:
        raise ValueError(f"TP {target.tp} does not divide I = {case.intermediate} of {case.id}")
    with call_of(IMPORT):
        factory = target.factory
    started = time.perf_counter()
    problem = problem or Problem.of(case, fresh=fresh, method=target.method, backward=backward)
    result = Result(problem)
    raised = None
    try:
        with CallLog() as calls:
            run_case(factory, case, inputs=problem.inputs, backward=backward, into=result.actual, **target.how)
    except ENGINE_EXCEPTIONS as error:
        raised = crash_or_raise(error, calls.failed)
    result.actual = {name: tensor.detach() for name, tensor in result.actual.items()}
    duration = time.perf_counter() - started
    asked = "form" not in target.gates_off
    forms = wrong_forms(case, result.actual, arguments_of(problem.inputs)) if asked else {}
    for name in [name for name in wanted if name in result.actual]:
        repro = repro_command(target, case, tensor=name, fresh=fresh)
        where = {**facts(target, name), "case": case, "source": problem.source, "duration_s": duration, "repro": repro}
        if name in forms:
            result.records.append(wrong_form(name, forms[name], where))
            continue
        if target.method != METHOD and name in GRAD_NAMES:
            result.records.append(_skipped_gradient(result.actual[name], where))
            continue
        difference = problem.expected.compare(name, result.actual[name])
        claims: dict[str, Any] = {"own_engine": target.strict, "isa": isa_name(target.label)}
        rounding = problem.expected.rounding[name]
        judgement = judge(case, name, difference, rounding, gates_off=target.gates_off, **claims)
        result.records.append(accuracy_record(judgement, difference, **where))
    if raised is not None:
        missing = [name for name in wanted if name not in result.actual]
        if not missing and not isinstance(raised, NotImplementedError):
            # an error after the last tensor, as in the clean-up, is reported beside that tensor's own record
            missing = [wanted[-1]]
        result.records += lost(raised, missing, target, case, source=problem.source)
    small = flops(case, backward=True) <= _SMALL
    if problem.source == "golden" and result.passed and small and not registry.ours(target.engine):
        # an engine could look a stored answer up; it cannot know the answer for a seed that is drawn now
        hosted.end_soiled()
        other = case.with_seed(secrets.randbelow(1 << 31))
        again = Problem.of(other, fresh=True, backward=backward)
        asked_too = check_case(target, other, fresh=True, backward=backward, tensors=tensors, problem=again)
        wrong = {record.tensor: record for record in asked_too.records if record.verdict not in ("PASS", "MISTRUSTED")}
        result.records = [wrong.get(record.tensor, record) for record in result.records]
    return result


def lost(
    error: BaseException,
    tensors: Sequence[str],
    target: Target,
    case: Case,
    *,
    source: str = "golden",
    family: str = "",
) -> list[AccuracyRecord]:
    """The records of `tensors` that the engine did not give: UNSUPPORTED where it declares so, else what `error` is.

    family: "training" for those of a training; else forward or backward, by the tensor.
    """
    verdict, message = verdict_of(error)
    training = family == "training"
    repro = verify_command(target, case) if training else repro_command(target, case, fresh=source == "fresh")
    about: dict[str, Any] = {"case": case.id, "why": case.why, "source": source, "repro": repro}
    more = {"family": family} if family else {}
    return [AccuracyRecord(verdict=verdict, message=message, **{**facts(target, n), **about, **more}) for n in tensors]


def facts(target: Target, tensor: str) -> dict[str, Any]:
    """The fields of a record that say what was judged: tensor, its family, and the target."""
    return {
        "family": "forward" if tensor == OUTPUT else "backward",
        "tensor": tensor,
        "engine": target.engine,
        "isa": target.label,
        "threads": target.threads or 0,
        "tp": target.tp,
    }


def verdict_of(error: BaseException) -> tuple[VerdictName, str]:
    """What an engine's exception means where nothing was to be refused, and its text.

    NotImplementedError declares what the engine cannot do; an exception with a `verdict` has that one.
    """
    if isinstance(error, NotImplementedError):
        reason = " ".join(str(error).split()) or "the engine gave no reason"
        return "UNSUPPORTED", f"UNSUPPORTED {reason}"[:MESSAGE]
    verdict: VerdictName = getattr(error, "verdict", "CRASH")
    return verdict, (str(error) if hasattr(error, "verdict") else describe(error))[:MESSAGE]


def check_names(tensors: Sequence[str] | None, backward: bool) -> tuple[str, ...]:
    """The tensors to judge, in the contract's order. ValueError for a name that is none, or needs the backward."""
    computed = ALL_TENSORS if backward else (OUTPUT,)
    if not tensors:
        return computed
    for name in tensors:
        if name not in computed:
            raise ValueError(f"tensor is {name!r}, it takes one of {', '.join(computed)}")
    return tuple(name for name in ALL_TENSORS if name in tensors)


def wrong_form(name: str, text: str, where: dict[str, Any]) -> AccuracyRecord:
    """The record of a tensor whose numbers are not judged, because it has another form than the contract's.

    where: the other fields of the record.
    """
    gate = GateRecord(gate="form", value=1.0, budget=0.0, used=math.inf, verdict="FAIL", reason=text)
    about = {**where, "case": where["case"].id, "why": where["case"].why}
    return AccuracyRecord(verdict="FAIL", message=f"FAIL {text}", gates=(gate,), **about)


def _skipped_gradient(actual: torch.Tensor, where: dict[str, Any]) -> AccuracyRecord:
    """The record of a LoRA gradient under SkipLoRA: it must be exactly zero."""
    difference = compare(actual, torch.zeros_like(actual))
    count = float(torch.count_nonzero(actual))
    verdict = Verdict.PASS if count == 0 else Verdict.FAIL
    used = 0.0 if count == 0 else float("inf")
    gate = GateResult("stray", count, 0.0, used, verdict, "SkipLoRA gives base gradients only")
    line = f"{verdict.value} {where['tensor']} stray {count:.0f}, budget 0"
    return accuracy_record(Judgement(verdict, (gate,), line), difference, **where)


# ---- the checks of the families forward and backward


@functools.lru_cache(maxsize=1)
def problem_of(case: Case, fresh: bool) -> Problem:
    """The problem of a case, kept for the next instruction set, family or engine that asks for the same case.

    Without `fresh`, NoGolden for a case that has none: a live oracle must not take a golden's place in silence.
    """
    if not fresh:
        golden.load(case)
    return Problem.of(case, fresh=fresh)


def prepare(case: Case, fresh: bool) -> None:
    """Make the problem of a case. No engine is involved: what this raises is the suite's own defect."""
    problem_of(case, fresh)


def check_family(target: Target, case: Case, family: str, fresh: bool) -> Result:
    """The Result of `case` with the tensors of `family`, "forward" or "backward": what pytest runs, for its records."""
    how: dict[str, Any] = {"backward": family == "backward", "tensors": TENSORS[family]}
    return check_case(target, case, fresh=fresh, problem=problem_of(case, fresh), **how)


def check_tensors(target: Target, case: Case, family: str) -> None:
    """GateFailed unless every tensor of `family` passes, Unsupported where nothing ran: what the registry runs."""
    problem = problem_of(case, False)
    # an engine may write into its inputs; the next one must not get what it wrote
    inputs = replace(problem.inputs, **{name: getattr(problem.inputs, name).clone() for name in TOKENS})
    own = replace(problem, inputs=inputs)
    result = check_case(target, case, backward=family == "backward", tensors=TENSORS[family], problem=own)
    bad = [record for record in result.records if record.verdict != "PASS"]
    _raise_unsupported(bad)
    if bad:
        exceeded = tuple((g.gate, g.used) for record in bad for g in record.gates if g.verdict != "PASS")
        raise GateFailed("\n".join(record.message for record in bad), exceeded, result=result)


# a sentence of docs/contract.md
IDLE_EXPERTS = "An expert that no token has reached costs no memory for its weights."


def of_weights(error: EngineOutOfMemory, case: Case) -> EngineOutOfMemory:
    """The same error, with the weights that the case declares and the sentence of the contract about them."""
    what, separator, words = str(error).partition("; last words:")
    reached = min(case.num_experts, case.qlen * case.top_k)
    each = 6 * case.hidden * case.intermediate
    declared = f"{case.num_experts} experts of {each / 1e6:.0f} MB, {case.num_experts * each / 1e9:.1f} GB in all"
    found = EngineOutOfMemory(
        f"{what}. This shows nothing about its numbers. The case declares {declared}, and its tokens reach at most "
        f'{reached} of them; docs/contract.md: "{IDLE_EXPERTS}"{separator}{words}'
    )
    found.call = error.call
    return found


def assert_passed(records: list[AccuracyRecord]) -> None:
    """NotPassed with the line of every tensor that did not pass and what repeats it; Unsupported where nothing ran."""
    failed = [record for record in records if record.verdict != "PASS"]
    _raise_unsupported(failed)
    if failed:
        lines = dict.fromkeys(record.message.partition("\n")[0] for record in failed)
        causes = dict.fromkeys(cause for cause in (cause_of(record.message) for record in failed) if cause)
        raise NotPassed("\n".join([*lines, *causes, failed[0].repro, f"({failed[0].case}: {failed[0].why})"]))
    if not records:
        raise AssertionError("nothing was compared")


def _raise_unsupported(failed: list[AccuracyRecord]) -> None:
    if failed and all(record.verdict == "UNSUPPORTED" for record in failed):
        raise Unsupported(failed[0].message.removeprefix("UNSUPPORTED "))


for _case in cases.catalogue().values():
    for _family in TENSORS:
        _more: dict[str, Any] = {"case": _case, "arguments": {"family": _family}, "confirmable": True}
        enter([Check(f"{_family}/{_case.name}", _family, check_tensors, BUDGET, (*NUMBERS, "form"), **_more)])
