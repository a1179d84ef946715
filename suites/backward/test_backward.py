"""grad_input, the six LoRA gradients and the routing gradient, each by name, for every case and instruction set."""

from __future__ import annotations

from collections.abc import Callable

from ktverify.checks.isas import Isa
from ktverify.spec.cases import Case


def test_case(judge_case: Callable[[str, Case, Isa], None], case: Case, isa: Isa) -> None:
    judge_case("backward", case, isa)
