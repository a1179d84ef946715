"""Small integers: every instruction set and every tensor-parallel degree gives the oracle's bits.

Asked of engines that owe fp32 sums; others keep their budgets.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ktverify.checks import exact, isas
from ktverify.checks.isas import Isa
from ktverify.checks.target import Target, expect_same_bits
from ktverify.engines import registry
from ktverify.isolation.child import ChildPool
from ktverify.spec import cases
from ktverify.spec.cases import Case

About = Callable[[Case, int], None]

CASES = [case for case in cases.select(data="integer") if case.tier == "default"]
# one with blocks of every size and one that is a multiple of nothing, so that the family never depends on a table
CASES.append(Case.parse("E=4,k=2,H=160,I=96,T=37,r=8,alpha=16,data=integer"))
CASES.append(Case.parse("E=5,k=3,H=97,I=47,T=19,r=3,alpha=6,data=integer,lora=float32"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_oracle(
    engine: str, children: ChildPool, isa: Isa, case: Case, fresh: int | None, about: About
) -> None:
    case = case if fresh is None else case.with_seed(fresh)
    for tp in case.tp:
        about(case, tp)
        children.get(isa.env).call(exact.check_exact, target=Target(engine, isa.name), case=case, tp=tp)


def test_instruction_sets_agree(engine: str, children: ChildPool, pytestconfig: pytest.Config, about: About) -> None:
    case = Case.parse("E=6,k=2,H=192,I=128,T=40,r=8,alpha=16,data=integer,routing=zipf")
    about(case, 1)
    found = [
        (
            isa,
            children.get(isa.env).call(exact.check_exact, target=Target(engine, isa.name), case=case),
        )
        for isa in isas.planned(engine, pytestconfig.option.isa)
    ]
    first, tensors = found[0]
    for isa, other in found[1:] if registry.strict(engine) else ():
        expect_same_bits(f"{first.label} and {isa.label}", tensors, other)
