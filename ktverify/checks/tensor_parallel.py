"""Tensor parallelism: which degrees are refused, and what the accepted ones compute."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.check import Check, Where, enter
from ktverify.checks.judging import NUMBERS, expect_forms
from ktverify.checks.problem import Problem, Result, live_oracle
from ktverify.checks.target import SMALL, Target
from ktverify.errors import GateFailed
from ktverify.judge import gates, metrics
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS

# how a line of judge_degrees begins that compares with the oracle, not with another degree
AGAINST_THE_ORACLE = "TP "


def degrees_that_work(intermediate: int, up_to: int) -> list[int]:
    """Every tensor-parallel degree from 1 to `up_to` that splits `intermediate` evenly."""
    return [degree for degree in range(1, up_to + 1) if intermediate % degree == 0]


def check_degree(target: Target, intermediate: int, degree: int) -> None:
    """AssertionError unless `degree` is accepted where it divides, else refused with the contract's sentence."""
    what = f"moe_intermediate_size {intermediate}, threadpool_count {degree}"
    try:
        layer = target.bare(moe_intermediate_size=intermediate, threadpool_count=degree, cpuinfer_threads=2)
    except NotImplementedError:
        # a RuntimeError too, but one that declares
        raise
    except RuntimeError as error:
        target.expect(intermediate % degree != 0, f"{what}: refused though it divides: {error}", "refusal")
        text = str(error)
        sentence = f"For TP, intermediate_size ({intermediate}) must be a multiple of threadpool_count ({degree})"
        target.expect(sentence in text, f"{what}: the error must say {sentence!r}, it says {text!r}", "refusal")
        named = {int(number) for number in re.findall(r"\d+", text.replace(sentence, ""))}
        needed = set(degrees_that_work(intermediate, degree))
        target.expect(
            needed <= named,
            f"{what}: the degrees that would work, {sorted(needed)}, must be named: {text!r}",
            "refusal",
        )
        lies = {number for number in named if intermediate % max(number, 1)}
        target.expect(not lies, f"{what}: {sorted(lies)} would not work but is named: {text!r}", "refusal")
        return
    target.expect(
        intermediate % degree == 0, f"{what}: accepted, though {degree} does not divide {intermediate}", "refusal"
    )
    del layer


def check_bad_degree(target: Target, degree: int) -> None:
    """AssertionError unless a threadpool_count that is no degree at all is refused by name."""
    try:
        target.bare(SMALL, threadpool_count=degree)
    except NotImplementedError:
        raise
    except (ValueError, RuntimeError) as error:
        target.expect(
            "threadpool_count" in str(error), f"the error must name threadpool_count, it says {error}", "refusal"
        )
        return
    target.accepted(f"threadpool_count {degree}")


DEGREES = (1, 2, 4)


def run_degree(target: Target, case: Case) -> dict[str, Tensor]:
    """ALL_TENSORS of a case at the target's tensor parallel degree. GateFailed where one has another form."""
    inputs = make_inputs(case)
    found = target.run(case, inputs)
    expect_forms(target, f"{case.id} with TP {target.tp}", found, inputs)
    return found


def check_degrees(target: Target, case: Case) -> None:
    """GateFailed unless DEGREES, computed one after the other in this process, are right and agree."""
    judge_degrees(target, case, {tp: run_degree(replace(target, tp=tp), case) for tp in DEGREES})


def judge_degrees(target: Target, case: Case, found: dict[int, dict[str, Tensor]]) -> None:
    """GateFailed unless the tensors of each degree are right and those of all degrees agree.

    Each degree keeps the budgets of `gates`. Engines that claim fp32 sums moreover have the same bits at all degrees of
    an integer case, and otherwise differ between degrees by no more than a sum in another order may.
    """
    inputs = make_inputs(case)
    oracle = live_oracle(inputs)
    exceeded: list[tuple[str, float]] = []
    lines: list[str] = [case.id]
    wrong: Result | None = None
    first, *others = sorted(found)
    for degree in (first, *others):
        for name in ALL_TENSORS:
            judgement = gates.judge(
                case,
                name,
                oracle.compare(name, found[degree][name]),
                oracle.rounding[name],
                own_engine=target.strict,
                isa=target.isa or "",
                gates_off=target.gates_off,
            )
            if judgement.exceeded:
                exceeded += [(gate.gate, gate.used) for gate in judgement.exceeded]
                lines.append(f"{AGAINST_THE_ORACLE}{degree}: {judgement.line.partition(chr(10))[0]}")
                wrong = wrong or Result(Problem(case, inputs, oracle, "fresh"), found[degree], tp=degree)
    for degree in others if target.strict else ():
        if case.exact:
            try:
                target.expect_same_bits(f"{case.id}: TP {first} and TP {degree}", found[first], found[degree])
            except GateFailed as error:
                exceeded += error.exceeded
                lines.append(str(error))
            continue
        budget = float(gates.tolerances()["tp"]["rel_l2"])
        for name in ALL_TENSORS:
            apart = metrics.compare(found[degree][name], found[first][name].double())
            if target.asks("tp") and not apart.rel_l2 <= budget:
                exceeded.append(("tp", apart.rel_l2 / budget))
                lines.append(
                    f"FAIL {name}: TP {degree} is {apart.rel_l2:.1e} from TP {first}, budget {budget:.1e}, "
                    f"worst {list(apart.worst_index)}"
                )
    if exceeded:
        raise GateFailed("\n".join(dict.fromkeys(lines)), tuple(exceeded), result=wrong)


CASES = {
    "gaussian": "E=8,k=2,H=256,I=256,T=48,r=8,alpha=16",
    # 2 x 118 and 4 x 59 rows: parts that are no multiple of any block
    "odd_parts": "E=5,k=3,H=97,I=236,T=33,r=5,alpha=8,routing=zipf,lora=float32",
    "decode": "E=16,k=4,H=128,I=128,T=1,r=16,alpha=32",
    "integer": "E=6,k=2,H=160,I=256,T=40,r=8,alpha=16,data=integer",
    "permuted": "E=7,k=2,H=64,I=128,T=21,r=8,alpha=8,routing=masked,map=permuted",
}
# moe_intermediate_size -> degrees tried: primes, powers of two and their neighbours, the sizes of real models
TRIED = {
    2049: (1, 2, 3, 4, 8),
    2048: (1, 2, 3, 4, 5, 6, 8),
    1408: (2, 3, 4, 8, 11),
    768: (2, 3, 4, 5, 7),
    14336: (2, 3, 4, 7, 8),
    47: (1, 2, 47),
    48: (5, 7, 9, 12),
    1: (1, 2),
    6: (1, 2, 3, 4, 6, 12),
}

enter(
    Check(
        f"tp/{name}",
        "tp_consistency",
        check_degrees,
        "Every tensor-parallel degree keeps the budget; under strict limits they also agree with each other, up to the "
        "order of a sum.",
        (*NUMBERS, "tp", "bits"),
        cause=Cause.TP_PART,
        case=Case.parse(text),
    )
    for name, text in CASES.items()
)
enter(
    Check(
        f"tp_constraint/{intermediate}/{degree}",
        "tp_constraint",
        check_degree,
        "For TP, intermediate_size (2049) must be a multiple of threadpool_count (4)",
        ("refusal",),
        cause=Cause.REFUSAL,
        arguments={"intermediate": intermediate, "degree": degree},
        where=Where.OWN_CHOICE,
    )
    for intermediate, degrees in TRIED.items()
    for degree in degrees
)
enter(
    Check(
        f"tp_constraint/{degree}",
        "tp_constraint",
        check_bad_degree,
        "threadpool_count of 0 or less",
        ("refusal",),
        cause=Cause.REFUSAL,
        arguments={"degree": degree},
        where=Where.OWN_CHOICE,
    )
    for degree in (0, -1, -4)
)
