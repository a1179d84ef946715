"""Each property is violated by an engine that is wrong in the way it is about, and the smallest case is printed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.cases import Case
from suites.support import drawn, properties
from suites.support.broken import _Spoiled
from suites.support.properties import PROPERTIES
from suites.support.subject import Subject


class last_token_lost(_Spoiled):
    """The last of several tokens gets nothing: an off-by-one in the loop over tokens."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(*args, **kwargs).clone()
        if len(output) > 1:
            output[-1] = 0
        return output


class last_slot_lost(_Spoiled):
    """The last of several slots gets nothing."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
        weights = weights.clone()
        weights[:, 1:][:, -1:] = 0
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids, weights, **kwargs)
        return output


class third_token_doubled(_Spoiled):
    """What a token gets depends on its place in the call."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(*args, **kwargs).clone()
        output[2:3] *= 2
        return output


class gradients_left_over(_Spoiled):
    """Every backward after the first has the gradients of the one before in it."""

    _left: dict[str, Tensor] | None = None

    def backward(self, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        grad_input, found = self.layer.backward(grad_output)
        total = found if self._left is None else {name: found[name] + self._left[name] for name in found}
        self._left = {name: tensor.clone() for name, tensor in found.items()}
        return grad_input, total


class b_never_zero(_Spoiled):
    """Takes a LoRA B that is all zero for one that was not initialised."""

    def init_lora_weights(self, *given: Tensor) -> None:
        self.layer.init_lora_weights(*(tensor if bool(tensor.any()) else tensor + 1 for tensor in given))


class duplicates_counted_once(_Spoiled):
    """An expert that is in two slots of a token counts once."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
        if expert_ids.shape[1] > 1:
            again = expert_ids[:, 1] == expert_ids[:, 0]
            weights = weights.clone()
            weights[:, 1][again] = 0
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids, weights, **kwargs)
        return output


class nan_times_zero(_Spoiled):
    """Multiplies idle experts' results by zero instead of leaving them out."""

    def load_weights_from_tensors(self, *given: Tensor) -> None:
        self._spoil = given[0].float().sum() * 0
        self.layer.load_weights_from_tensors(*given)

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(*args, **kwargs)
        return output + self._spoil.to(output.dtype)


class weights_normalised(_Spoiled):
    """Divides a token's routing weights by their sum, as a router may but a layer must not."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
        total = weights.sum(dim=1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids, weights, **kwargs)
        return output


class first_expert_twice(_Spoiled):
    """Expert 0 is computed with half its rows' weight: the order of experts matters."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
        weights = torch.where(expert_ids == 0, 2 * weights, weights)
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids, weights, **kwargs)
        return output


HERE = "suites.meta.test_properties_catch"
# property, an engine that violates it
VIOLATED = {
    "within_budget": "suites.support.broken:k_remainder_skipped",
    "permuted_experts": f"{HERE}:first_expert_twice",
    "permuted_tokens": f"{HERE}:last_token_lost",
    "permuted_slots": f"{HERE}:last_slot_lost",
    "split_batch": f"{HERE}:third_token_doubled",
    "accumulated_gradients": f"{HERE}:gradients_left_over",
    "zero_lora_b": f"{HERE}:b_never_zero",
    "scaled_alpha": "suites.support.broken:lora_scale_one",
    "merged_slots": f"{HERE}:duplicates_counted_once",
    "idle_experts": f"{HERE}:nan_times_zero",
    "linear_weights": f"{HERE}:weights_normalised",
    "tensor_parallel": "suites.support.broken:tp_part_lost",
    "finite_differences": "suites.support.broken:no_routing_weight_in_backward",
}
# those whose smallest case is also looked for here: it takes hundreds of runs of an engine
SHRUNK = ("zero_lora_b", "idle_experts")
SMALL = drawn.Sizes(experts=3, slots=2, tokens=4, width=36, rank=3)


def _search(name: str, engine: str, examples: int) -> None:
    drawn.search(
        name,
        PROPERTIES[name],
        lambda case: properties.check(Subject(engine), name, case),
        examples=examples,
        sizes=SMALL,
        options=f" --engine {engine}",
        shrink=name in SHRUNK,
    )


def test_every_property_has_a_wrong_engine() -> None:
    assert set(VIOLATED) == set(PROPERTIES)


@pytest.mark.parametrize("name", VIOLATED)
def test_wrong_engine_violates_it(name: str) -> None:
    with pytest.raises(drawn.Violated) as found:
        _search(name, VIOLATED[name], examples=20)
    title, text, *said, repeat = str(found.value).splitlines()
    assert title.startswith(name)
    assert said
    case = Case.parse(text)
    if name in SHRUNK:
        assert (case.num_experts, case.hidden, case.rank) == (1, 1, 1), "the case was not made small"
    assert repeat == f"pytest suites/properties -k {name} --case '{case.id}' --engine {VIOLATED[name]}"
    # the case alone repeats it
    with pytest.raises((AssertionError, RuntimeError)):
        properties.check(Subject(VIOLATED[name]), name, case)


def test_comparisons_that_prove_nothing_do_not_pass() -> None:
    with pytest.raises(drawn.Violated, match="0 of 0"):
        drawn.search("within_budget", PROPERTIES["within_budget"], lambda case: (0, 0), examples=2)
    with pytest.raises(drawn.Violated, match="only 4 of 10"):
        drawn.believe("within_budget", compared=10, believed=4)
    drawn.believe("within_budget", compared=10, believed=5)


def test_draws_repeat_themselves() -> None:
    def drawn_cases(fresh: int) -> list[str]:
        seen: list[str] = []

        def run(case: Case) -> tuple[int, int]:
            seen.append(case.id)
            assert Case.parse(case.id) == case
            return 1, 1

        drawn.search("within_budget", PROPERTIES["within_budget"], run, examples=30, fresh=fresh)
        return seen

    first = drawn_cases(0)
    assert first == drawn_cases(0)
    assert first != drawn_cases(1)
    assert len(set(first)) >= 25
