"""Mutants of experts that are divided among processes: a right engine, and a division that is wrong in one step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.engines.expert_parallel import Compute, Route, Share
from ktverify.mutants.base import Plain, mutant


def division(check: str, gate: str = "rel_l2") -> Callable[[type[Share]], type[Plain]]:
    """Enter a right engine whose experts are divided by this Share into MUTANTS, by the Share's name and docstring."""

    def enter(share: type[Share]) -> type[Plain]:
        facts = {"__doc__": share.__doc__, "__module__": share.__module__, "share": share}
        engine: type[Plain] = type(share.__name__, (Plain,), facts)
        return mutant(Cause.DIVIDED, check, gate)(engine)

    return enter


@division("expert_parallel/ranks/2")
class divided_by_the_ranks_once_more(Share):
    """A rank's results are divided by the number of ranks, as if each rank had computed all of them."""

    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().added(of_slots, weights) / self.size


@division("expert_parallel/ranks/2")
class no_routing_gradient_over_ranks(Share):
    """The gradient of the routing weights is 0, because the outputs came from other processes."""

    def weight_gradient(self, of_slots: Tensor, upstream: Tensor) -> Tensor:
        return torch.zeros(of_slots.shape[:2])


@division("expert_parallel/ranks/3")
class routing_gradient_of_the_first_rank_alone(Share):
    """The gradient of the routing weights is computed on the first rank alone."""

    def weight_gradient(self, of_slots: Tensor, upstream: Tensor) -> Tensor:
        found = super().weight_gradient(of_slots, upstream)
        return found * (self.rank == 0)


@division("expert_parallel/ranks/4")
class experts_of_a_rank_shifted_by_one(Share):
    """A rank has the experts that begin one behind those whose rows it gets."""

    @property
    def experts(self) -> Any:
        return [(expert + 1) % self.total for expert in super().experts]


@division("expert_parallel/ranks/3")
class rows_come_home_in_another_order(Share):
    """Outputs are taken for those of the slots in their order, and came by expert."""

    def back(self, route: Route, rows: Tensor) -> Tensor:
        found = rows.new_zeros((route.tokens * route.top_k, rows.shape[1]))
        # as they were before they were sorted by expert
        found[route.slots.sort().values] = self.exchange(rows, route.received, route.sent)
        return found.view(route.tokens, route.top_k, rows.shape[1])


@division("expert_parallel/scaling")
class routing_weight_on_both_ranks(Share):
    """The backward multiplies by the routing weight on the token's rank and on the expert's."""

    def weighted(self, route: Route, upstream: Tensor, weights: Tensor) -> Tensor:
        return super().weighted(route, upstream, weights.square())


@division("expert_parallel/scaling")
class no_routing_weight_over_ranks(Share):
    """The gradients that travel to the experts are those before the routing weight."""

    def weighted(self, route: Route, upstream: Tensor, weights: Tensor) -> Tensor:
        return super().weighted(route, upstream, torch.ones_like(weights))


@division("expert_parallel/routings/masked")
class masked_slot_goes_to_the_first_expert(Share):
    """A slot of -1 travels to the first rank, whose first expert computes it."""

    def forward(self, compute: Compute, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(compute, hidden_states, expert_ids.clamp(min=0), weights.nan_to_num(1.0))


@division("expert_parallel/routings/duplicates")
class duplicate_travels_once(Share):
    """A row that a token has twice for one expert travels once, and counts once."""

    def forward(self, compute: Compute, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        ids = expert_ids.clone()
        for slot in range(1, ids.shape[1]):
            ids[:, slot][(expert_ids[:, :slot] == expert_ids[:, slot : slot + 1]).any(1)] = -1
        return super().forward(compute, hidden_states, ids, weights)


@division("expert_parallel/routings/empty_rank", "raised")
class rank_without_a_token_raises(Share):
    """A rank without a token is an error."""

    def go(self, route: Route, rows: Tensor) -> Tensor:
        if not len(rows):
            raise RuntimeError("a rank without a row has nothing to send")
        return super().go(route, rows)


@division("expert_parallel/ranks/2")
class grad_input_of_the_first_slot_alone(Share):
    """A token's grad_input has the part of its first slot, of whichever rank."""

    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().added(of_slots, weights) if weights is not None else super().added(of_slots[:, :1])


@division("expert_parallel/bits_of_one", "bits")
class slots_added_in_an_order_by_rank(Share):
    """A token's slots are added in bf16, beginning with the slot of its rank's number."""

    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(of_slots[:, 0])
        slots = range(of_slots.shape[1])
        for slot in sorted(slots, key=lambda slot: (slot - self.rank) % len(slots)):
            weight = 1.0 if weights is None else weights[:, slot : slot + 1]
            total = (total.float() + of_slots[:, slot].float() * weight).to(torch.bfloat16)
        return total


@division("expert_parallel/reduced", "bits")
class lora_of_experts_reduced_over_ranks(Share):
    """The LoRA gradients of different experts are added over the ranks, like dense ones."""

    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        norm = super().reduce(dense, own)
        super().reduce(own, ())
        return norm


@division("expert_parallel/reduced", "bits")
class dense_gradients_divided_by_the_ranks(Share):
    """Dense gradients are divided by the number of ranks, although each rank's loss is a part of the batch's."""

    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        norm = super().reduce(dense, own)
        for gradient in dense:
            gradient /= self.size
        return norm


@division("expert_parallel/reduced", "bits")
class norm_counts_dense_gradients_by_rank(Share):
    """The norm for clipping counts a dense gradient once for each rank."""

    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        norm = super().reduce(dense, own)
        more = sum(float(gradient.double().square().sum()) for gradient in dense) * (self.size - 1)
        return (norm.double().square() + more).sqrt().float()


@division("expert_parallel/reduced", "bits")
class norm_without_other_ranks_experts(Share):
    """The norm for clipping has the experts of its own rank alone, so that each rank clips by another one."""

    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        super().reduce(dense, own)
        return torch.nn.utils.get_total_norm([*dense, *own])


@division("expert_parallel/saved", "bits")
class ranks_saved_in_another_order(Share):
    """The LoRA of all experts is put together beginning with the last rank."""

    def whole(self, own: Tensor, dim: int = 0) -> Tensor:
        parts = self.to_first(own)
        return torch.cat(parts[::-1], dim) if parts else own


@division("expert_parallel/repeats", "bits")
class ranks_add_in_the_order_of_arrival(Share):
    """Rows are added as they arrive: one element of the output is a unit off in every third sum."""

    _sums = itertools.count(1)

    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        found = super().added(of_slots, weights)
        if found.numel() and next(self._sums) % 3 == 0:
            found.view(torch.int16)[0, 0] ^= 1
        return found
