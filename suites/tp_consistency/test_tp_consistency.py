"""TP 1, 2 and 4 against the oracle and each other, forward and every gradient, each degree in a process of its own."""

from __future__ import annotations

from dataclasses import replace

from ktverify.checks.check import Check
from ktverify.checks.isas import Isa
from ktverify.checks.target import Target
from ktverify.checks.tensor_parallel import AGAINST_THE_ORACLE, DEGREES, judge_degrees, run_degree
from ktverify.errors import GateFailed
from ktverify.pytest_plugin.ask import Ask, each


@each("tp")
def test_degrees_agree(ask: Ask, check: Check, isa: Isa) -> None:
    case, target = check.with_seed(ask.fresh).case, Target(ask.engine, isa.name)
    assert case is not None
    found = {}
    for tp in DEGREES:
        ask.about(case, tp)
        found[tp] = ask.children.call_fresh(run_degree, replace(target, tp=tp), case, env=isa.env)
    ask.about(None, 1)
    try:
        ask.children.get().call(judge_degrees, target, case, found)
    except GateFailed as failed:
        if any(line.startswith(AGAINST_THE_ORACLE) for line in str(failed).splitlines()):
            # one forward and backward shows it, not only the comparison of two degrees
            ask.about(case, 1)
        raise
