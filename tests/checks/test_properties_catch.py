"""Each property is violated by an engine that is wrong in the way it is about, and the smallest case is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.checks import properties, property_search
from ktverify.checks.properties import PROPERTIES
from ktverify.checks.target import Target
from ktverify.errors import EngineDied, PropertyFailed, Unsupported
from ktverify.mutants import MUTANTS
from ktverify.mutants.base import Group, Plain
from ktverify.spec.cases import Case


class third_token_doubled(Plain):
    """What a token gets depends on its place in the call."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward_sft(*args, **kwargs)
        output[2:3] *= 2
        return output


class b_never_zero(Plain):
    """Takes a LoRA B that is all zero for one that was not initialised."""

    def init_lora_weights(self, *given: Tensor) -> None:
        super().init_lora_weights(*(tensor if bool(tensor.any()) else tensor + 1 for tensor in given))


class idle_times_zero(Plain):
    """Multiplies idle experts' results by zero instead of leaving them out."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        gate, _, _ = self._base
        return super().forward_sft(*args, **kwargs) + (gate.float().sum() * 0).to(torch.bfloat16)


class expert_0_doubled(Plain):
    """Expert 0 counts twice: the order of experts matters."""

    def combine(self, output: Tensor, at: Group) -> None:
        super().combine(output, at)
        if at.expert == 0:
            super().combine(output, at)


def _here(factory: type[Plain]) -> str:
    return f"{__name__}:{factory.__name__}"


# property, an engine that violates it
VIOLATED = {
    "within_budget": MUTANTS["hidden_remainder_skipped"].engine,
    "permuted_experts": _here(expert_0_doubled),
    "permuted_tokens": MUTANTS["last_token_left_out"].engine,
    "permuted_slots": MUTANTS["last_slot_dropped"].engine,
    "split_batch": _here(third_token_doubled),
    "accumulated_gradients": MUTANTS["gradients_accumulate_inside"].engine,
    "zero_lora_b": _here(b_never_zero),
    "scaled_alpha": MUTANTS["lora_scale_one"].engine,
    "merged_slots": MUTANTS["duplicate_counted_once"].engine,
    "idle_experts": _here(idle_times_zero),
    "linear_weights": MUTANTS["routing_weights_normalised"].engine,
    "tensor_parallel": MUTANTS["tp_part_lost"].engine,
    "finite_differences": MUTANTS["no_routing_weight_in_backward"].engine,
}
# those whose smallest case is also looked for here: it takes hundreds of runs of an engine
SHRUNK = ("zero_lora_b", "idle_experts")


def search(name: str, run: Callable[[Case], tuple[int, int]], **options: Any) -> None:
    property_search.search(name, PROPERTIES[name], run, **{"examples": 30, **options})


def drawn(name: str = "within_budget", **options: Any) -> list[Case]:
    """The cases of a search in which nothing is wrong."""
    seen: list[Case] = []

    def run(case: Case) -> tuple[int, int]:
        seen.append(case)
        return 1, 1

    search(name, run, **options)
    return seen


def test_every_property_has_a_wrong_engine() -> None:
    assert set(VIOLATED) == set(PROPERTIES)


@pytest.mark.parametrize("name", VIOLATED)
def test_wrong_engine_violates_it(name: str) -> None:
    engine = VIOLATED[name]
    with pytest.raises(PropertyFailed) as found:
        search(
            name,
            lambda case: properties.check_property(Target(engine), name, case),
            examples=20,
            sizes=property_search.Sizes(experts=3, slots=2, tokens=4, width=36, rank=3),
            options=f" --engine {engine}",
            shrink=name in SHRUNK,
        )
    title, text, *said, repeat = str(found.value).splitlines()
    assert title.startswith(name)
    assert said
    case = Case.parse(text)
    if name in SHRUNK:
        assert (case.num_experts, case.hidden, case.rank) == (1, 1, 1), "the case was not made small"
    assert repeat == f"pytest suites/properties -k {name} --case '{case.id}' --engine {engine}"
    # the case alone repeats it
    with pytest.raises((AssertionError, RuntimeError)):
        properties.check_property(Target(engine), name, case)


def test_a_case_that_ends_the_engine_is_not_tried_again() -> None:
    tried: list[Case] = []

    def run(case: Case) -> tuple[int, int]:
        tried.append(case)
        if case.hidden % 32:
            raise EngineDied("died of SIGSEGV")
        return 1, 1

    with pytest.raises(PropertyFailed, match="died of SIGSEGV") as found:
        search("within_budget", run)
    assert found.value.verdict == "CRASH"
    assert tried[-1].id in str(found.value)
    assert [bool(case.hidden % 32) for case in tried].count(True) == 1


def test_sizes_are_multiples_of_what_is_asked_for() -> None:
    seen = drawn("tensor_parallel", examples=20, sizes=property_search.Sizes(step=32))
    assert {(case.hidden % 32, case.intermediate % 128) for case in seen} == {(0, 0)}
    assert {case.hidden for case in seen} == {32, 64, 96}


def test_what_an_engine_cannot_do_violates_nothing() -> None:
    def run(case: Case) -> tuple[int, int]:
        if case.lora_dtype == "float32":
            raise NotImplementedError("LoRA in float32")
        return 1, 1

    def nothing(case: Case) -> tuple[int, int]:
        raise NotImplementedError("tensor parallelism")

    search("within_budget", run)
    with pytest.raises(Unsupported, match="tensor parallelism"):
        search("tensor_parallel", nothing, examples=3)


def test_comparisons_that_prove_nothing_do_not_pass() -> None:
    with pytest.raises(PropertyFailed, match="0 of 0"):
        search("within_budget", lambda case: (0, 0), examples=2)
    with pytest.raises(PropertyFailed, match="only 4 of 10"):
        property_search.believe("within_budget", compared=10, believed=4)
    property_search.believe("within_budget", compared=10, believed=5)


def test_draws_repeat_themselves() -> None:
    first = drawn()
    assert first == drawn() == [Case.parse(case.id) for case in first]
    assert first != drawn(fresh=1)
    assert len({case.id for case in first}) >= 25
