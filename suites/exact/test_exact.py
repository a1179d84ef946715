"""Small integers: every instruction set and every tensor parallel degree gives the oracle's bits.

Asked of engines that claim fp32 sums; others keep their budgets.
"""

from __future__ import annotations

from ktverify.checks import isas
from ktverify.checks.check import Check
from ktverify.checks.exact import check_exact
from ktverify.checks.isas import Isa
from ktverify.checks.target import Target, expect_same_bits
from ktverify.pytest_plugin.ask import Ask, each
from ktverify.spec.cases import Case


@each("exact")
def test_equals_the_oracle(ask: Ask, check: Check, isa: Isa) -> None:
    ask(check, isa)


def test_instruction_sets_agree(ask: Ask) -> None:
    case = Case.parse("E=6,k=2,H=192,I=128,T=40,r=8,alpha=16,data=integer,routing=zipf")
    ask.about(case, 1)
    found = []
    for isa in isas.planned(ask.engine, ask.chosen_isa):
        target = Target(ask.engine, isa.name)
        found.append((isa, ask.children.get(isa.env).call(check_exact, target, case)))
    first, tensors = found[0]
    for isa, other in found[1:] if Target(ask.engine).strict else ():
        expect_same_bits(f"{first.label} and {isa.label}", tensors, other)
