"""Tensor parallelism: which degrees are refused, and what the accepted ones compute."""

from __future__ import annotations

import re

from torch import Tensor

from ktverify.checks.expected import expected_of
from ktverify.checks.target import SMALL, Target
from ktverify.engines import registry
from ktverify.errors import GateFailed
from ktverify.judge import gates, metrics
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS

TpResults = dict[int, dict[str, Tensor]]


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


def run_degree(target: Target, cases: list[Case], degree: int) -> list[dict[str, Tensor]]:
    """ALL_TENSORS of each case at one tensor-parallel degree."""
    return [target.run(case, tp=degree) for case in cases]


def compare_degrees(target: Target, case: Case, found: TpResults) -> list[str]:
    """What is wrong with the results of `case` at several degrees, in words; [] if nothing. See exceeded_by."""
    return [line for _, _, line in exceeded_by(target, case, found)]


def exceeded_by(target: Target, case: Case, found: TpResults) -> list[tuple[str, float, str]]:
    """(gate, share of its budget, line) for all that is wrong with `found`, against the oracle and each other.

    Each degree keeps the budgets of `gates`. Engines that are `engines.strict` moreover have the same bits at all
    degrees of an integer case, and else differ between degrees by no more than a sum in another order may.
    """
    inputs = make_inputs(case)
    oracle, peer = expected_of(inputs)
    wrong: list[tuple[str, float, str]] = []
    first, *others = sorted(found)
    for degree in (first, *others):
        for name in ALL_TENSORS:
            actual = found[degree][name]
            judgement = gates.judge(
                case,
                name,
                metrics.compare(actual, oracle[name]),
                peer[name],
                own_engine=registry.strict(target.engine),
                isa=target.isa or "",
                gates_off=target.gates_off,
            )
            if judgement.verdict is not gates.Verdict.PASS:
                line = f"TP {degree}: {judgement.line.partition(chr(10))[0]}"
                bad = [gate for gate in judgement.gates if gate.verdict is not gates.Verdict.PASS]
                wrong += [(gate.gate, gate.used, line) for gate in bad]
    for degree in others if registry.strict(target.engine) else ():
        if case.exact:
            try:
                target.expect_same_bits(f"{case.id}: TP {first} and TP {degree}", found[first], found[degree])
            except GateFailed as error:
                wrong += [(gate, used, str(error)) for gate, used in error.exceeded]
            continue
        budget = float(gates.tolerances()["tp"]["rel_l2"])
        for name in ALL_TENSORS:
            apart = metrics.compare(found[degree][name], found[first][name].double())
            if target.asks("tp") and not apart.rel_l2 <= budget:
                line = (
                    f"FAIL {name}: TP {degree} is {apart.rel_l2:.1e} from TP {first}, budget {budget:.1e}, "
                    f"worst {list(apart.worst_index)}"
                )
                wrong.append(("tp", apart.rel_l2 / budget, line))
    return wrong
