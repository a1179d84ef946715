"""The forward's output, for every case of the catalogue and every instruction set that this CPU can run."""

from __future__ import annotations

from collections.abc import Callable

from ktverify.checks.isas import Isa
from ktverify.spec.cases import Case


def test_case(judge_case: Callable[[str, Case, Isa], None], case: Case, isa: Isa) -> None:
    judge_case("forward", case, isa)
