"""Integer data has one right answer: output and every gradient, bit for bit, of the engines that owe fp32 sums."""

from __future__ import annotations

import math

from torch import Tensor

from ktverify.checks.behaviour import raise_for
from ktverify.checks.expected import expected_of
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.errors import GateFailed
from ktverify.judge import gates, metrics
from ktverify.spec.cases import Case, expects_zero
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS


def check_exact(target: Target, case: Case, tp: int = 1) -> dict[str, Tensor]:
    """ALL_TENSORS of `case`, after each was found equal to the fp64 oracle rounded once to the tensor's dtype.

    Engines that are not `engines.strict` may round on the way: they are judged by the budgets, as everywhere.
    GateFailed names each tensor that is wrong, how many elements differ and where it is worst; also where the oracle's
    tensor is all zero though the case does not mean it to be.
    """
    inputs = make_inputs(case)
    oracle, peer = expected_of(inputs)
    actual = target.run(case, inputs, tp=tp)
    found = {name: metrics.compare(actual[name], oracle[name]) for name in ALL_TENSORS}
    if registry.strict(target.engine):
        _same_bits(target, f"{case.id} with TP {tp}", case, found)
    else:
        off = target.gates_off
        judgements = [
            gates.judge(case, name, difference, peer[name], gates_off=off) for name, difference in found.items()
        ]
        raise_for(f"{case.id} with TP {tp}", judgements)
    return actual


def _same_bits(target: Target, what: str, case: Case, found: dict[str, metrics.Difference]) -> None:
    wrong, exceeded = [], set()
    for name, difference in found.items():
        if difference.nonzero == 0 and not expects_zero(case, name) and target.asks("trust"):
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
        raise GateFailed("\n".join([what, *wrong]), tuple((gate, math.inf) for gate in sorted(exceeded)))
