"""What checks see of an engine in their own process they also see of one in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ktverify.checks import registry
from ktverify.checks.causes import Cause
from ktverify.isolation import hosted
from ktverify.judge.gates import GATES
from ktverify.mutants import MUTANTS, Mutant
from ktverify.mutants.kills import ask
from tests.support import apart

# numbers are numbers wherever they were computed
NUMBERS = set(list(GATES)[: list(GATES).index("trust")])
# the division among processes is no part of an engine that has a process of its own
SEEN = [mutant for mutant in MUTANTS.values() if mutant.gate not in NUMBERS and mutant.cause is not Cause.DIVIDED]


@pytest.fixture(scope="module", autouse=True)
def over() -> Iterator[None]:
    yield
    hosted.end_all()


@pytest.mark.parametrize("mutant", SEEN, ids=lambda mutant: mutant.name)
def test_a_mutant_in_a_process_of_its_own_is_found(mutant: Mutant) -> None:
    found = ask(registry.find(mutant.check), f"{apart.__name__}:{mutant.name}")
    assert mutant.gate in {exceeded.gate for exceeded in found}, found


@pytest.mark.parametrize("check", sorted({"expert_parallel/repeats", *(mutant.check for mutant in SEEN)}))
def test_a_right_engine_in_a_process_of_its_own_passes(check: str) -> None:
    right = "right_with_codes_and_masks" if check.startswith(("quantised/", "hybrid/")) else "right"
    if check == "processes/cleared_memory_comes_back":
        # on a CPU with AVX-512 BF16 oneDNN keeps 9 MB of what its products took, and has no call that returns them
        right = "right_without_onednn"
    assert ask(registry.find(check), f"{apart.__name__}:{right}") == []
