"""Integer data has one right answer: output and every gradient, bit for bit, of the engines that owe fp32 sums."""

from __future__ import annotations

import math

from torch import Tensor

from ktverify.checks.check import Check, enter
from ktverify.checks.judging import NUMBERS, expect_forms, raise_for
from ktverify.checks.problem import Problem, Result, live_oracle
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.judge import gates, metrics
from ktverify.spec import cases
from ktverify.spec.cases import Case, expects_zero
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS


def check_exact(target: Target, case: Case) -> dict[str, Tensor]:
    """ALL_TENSORS of `case`, after each was found equal to the fp64 oracle rounded once to the tensor's dtype.

    Engines that do not claim fp32 sums may round on the way: they are judged by the budgets, as everywhere.
    GateFailed names each tensor that is wrong, how many elements differ and where it is worst; also where the oracle's
    tensor is all zero though the case does not mean it to be.
    """
    inputs = make_inputs(case)
    oracle = live_oracle(inputs)
    actual = target.run(case, inputs)
    expect_forms(target, case.id, actual, inputs)
    found = {name: oracle.compare(name, actual[name]) for name in ALL_TENSORS}
    what, result = (
        f"{case.id} with TP {target.tp}",
        Result(Problem(case, inputs, oracle, "fresh"), actual, tp=target.tp),
    )
    if target.strict:
        _same_bits(target, what, found, result)
    else:
        judgements = [
            gates.judge(case, name, difference, oracle.rounding[name], gates_off=target.gates_off)
            for name, difference in found.items()
        ]
        raise_for(what, judgements, result)
    return actual


def _same_bits(target: Target, what: str, found: dict[str, metrics.Difference], result: Result) -> None:
    wrong, exceeded = [], set()
    for name, difference in found.items():
        if difference.nonzero == 0 and not expects_zero(result.problem.case, name) and target.asks("trust"):
            exceeded.add("trust")
            wrong.append(f"MISTRUSTED {name}: the oracle is all zero, equality would prove nothing")
        if difference.mismatched and target.asks("exact"):
            exceeded.add("exact")
            at = difference.worst_index
            wrong.append(
                f"FAIL {name} {difference.mismatched} of {difference.numel} elements differ, worst {list(at)}: "
                f"{difference.worst_actual:g}, expected {difference.worst_expected:g}"
            )
    if wrong:
        raise GateFailed("\n".join([what, *wrong]), tuple((gate, math.inf) for gate in sorted(exceeded)), result=result)


CASES = [
    *(case for case in cases.select(data="integer") if case.tier == "default"),
    # one with blocks of every size and one that is a multiple of nothing, so that the family never depends on a table
    Case.parse("E=4,k=2,H=160,I=96,T=37,r=8,alpha=16,data=integer"),
    Case.parse("E=5,k=3,H=97,I=47,T=19,r=3,alpha=6,data=integer,lora=float32"),
]

enter(
    Check(
        f"exact/{case.name if case.name != cases.CUSTOM else case.id}",
        "exact",
        check_exact,
        "Integer inputs, small enough for bf16 operands and fp32 sums to be exact, have one right answer.",
        (*NUMBERS, "exact"),
        case=case,
        confirmable=True,
        tp=case.tp,
    )
    for case in CASES
)
