"""Mutants of experts that are divided among processes: a right engine, and a division that is wrong in one step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.engines.expert_parallel import Compute, Route, Share
from ktverify.mutants.base import Plain, mutant

DIVIDED = Cause.DIVIDED


class _DividedByRanks(Share):
    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().added(of_slots, weights) / self.size


@mutant(DIVIDED, "expert_parallel/ranks/2")
class divided_by_the_ranks_once_more(Plain):
    """A rank's results are divided by the number of ranks, as if each rank had computed all of them."""

    share = _DividedByRanks


class _NoWeightGradient(Share):
    def weight_gradient(self, of_slots: Tensor, upstream: Tensor) -> Tensor:
        return torch.zeros(of_slots.shape[:2])


@mutant(DIVIDED, "expert_parallel/ranks/2")
class no_routing_gradient_over_ranks(Plain):
    """The gradient of the routing weights is 0, because the outputs came from other processes."""

    share = _NoWeightGradient


class _OnlyOwnWeightGradient(Share):
    def weight_gradient(self, of_slots: Tensor, upstream: Tensor) -> Tensor:
        found = super().weight_gradient(of_slots, upstream)
        return found * (self.rank == 0)


@mutant(DIVIDED, "expert_parallel/ranks/3")
class routing_gradient_of_the_first_rank_alone(Plain):
    """The gradient of the routing weights is computed on the first rank alone."""

    share = _OnlyOwnWeightGradient


class _ShiftedExperts(Share):
    @property
    def experts(self) -> Any:
        return [(expert + 1) % self.total for expert in super().experts]


@mutant(DIVIDED, "expert_parallel/ranks/4")
class experts_of_a_rank_shifted_by_one(Plain):
    """A rank has the experts that begin one behind those whose rows it gets."""

    share = _ShiftedExperts


class _HomeInAnotherOrder(Share):
    def back(self, route: Route, rows: Tensor) -> Tensor:
        found = rows.new_zeros((route.tokens * route.top_k, rows.shape[1]))
        # as they were before they were sorted by expert
        found[route.slots.sort().values] = self.exchange(rows, route.received, route.sent)
        return found.view(route.tokens, route.top_k, rows.shape[1])


@mutant(DIVIDED, "expert_parallel/ranks/3")
class rows_come_home_in_another_order(Plain):
    """Outputs are taken for those of the slots in their order, and came by expert."""

    share = _HomeInAnotherOrder


class _WeightedOnBothRanks(Share):
    def weighted(self, route: Route, upstream: Tensor, weights: Tensor) -> Tensor:
        return super().weighted(route, upstream, weights.square())


@mutant(DIVIDED, "expert_parallel/scaling")
class routing_weight_on_both_ranks(Plain):
    """The backward multiplies by the routing weight on the token's rank and on the expert's."""

    share = _WeightedOnBothRanks


class _Unweighted(Share):
    def weighted(self, route: Route, upstream: Tensor, weights: Tensor) -> Tensor:
        return super().weighted(route, upstream, torch.ones_like(weights))


@mutant(DIVIDED, "expert_parallel/scaling")
class no_routing_weight_over_ranks(Plain):
    """The gradients that travel to the experts are those before the routing weight."""

    share = _Unweighted


class _MaskedToFirst(Share):
    def forward(self, compute: Compute, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(compute, hidden_states, expert_ids.clamp(min=0), weights.nan_to_num(1.0))


@mutant(DIVIDED, "expert_parallel/routings/masked")
class masked_slot_goes_to_the_first_expert(Plain):
    """A slot of -1 travels to the first rank, whose first expert computes it."""

    share = _MaskedToFirst


class _DuplicatesOnce(Share):
    def forward(self, compute: Compute, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        ids = expert_ids.clone()
        for slot in range(1, ids.shape[1]):
            ids[:, slot][(expert_ids[:, :slot] == expert_ids[:, slot : slot + 1]).any(1)] = -1
        return super().forward(compute, hidden_states, ids, weights)


@mutant(DIVIDED, "expert_parallel/routings/duplicates")
class duplicate_travels_once(Plain):
    """A row that a token has twice for one expert travels once, and counts once."""

    share = _DuplicatesOnce


class _NothingToSend(Share):
    def go(self, route: Route, rows: Tensor) -> Tensor:
        if not len(rows):
            raise RuntimeError("a rank without a row has nothing to send")
        return super().go(route, rows)


@mutant(DIVIDED, "expert_parallel/routings/empty_rank", "raised")
class rank_without_a_token_raises(Plain):
    """A rank without a token is an error."""

    share = _NothingToSend


class _InputGradientOfOneSlot(Share):
    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().added(of_slots, weights) if weights is not None else super().added(of_slots[:, :1])


@mutant(DIVIDED, "expert_parallel/ranks/2")
class grad_input_of_the_first_slot_alone(Plain):
    """A token's grad_input has the part of its first slot, of whichever rank."""

    share = _InputGradientOfOneSlot


class _AddedByRank(Share):
    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(of_slots[:, 0])
        slots = range(of_slots.shape[1])
        for slot in sorted(slots, key=lambda slot: (slot - self.rank) % len(slots)):
            weight = 1.0 if weights is None else weights[:, slot : slot + 1]
            total = (total.float() + of_slots[:, slot].float() * weight).to(torch.bfloat16)
        return total


@mutant(DIVIDED, "expert_parallel/bits_of_one", "bits")
class slots_added_in_an_order_by_rank(Plain):
    """A token's slots are added in bf16, beginning with the slot of its rank's number."""

    share = _AddedByRank


class _ReducedAll(Share):
    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        norm = super().reduce(dense, own)
        super().reduce(own, ())
        return norm


@mutant(DIVIDED, "expert_parallel/reduced", "bits")
class lora_of_experts_reduced_over_ranks(Plain):
    """The LoRA gradients of different experts are added over the ranks, like dense ones."""

    share = _ReducedAll


class _Averaged(Share):
    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        norm = super().reduce(dense, own)
        for gradient in dense:
            gradient /= self.size
        return norm


@mutant(DIVIDED, "expert_parallel/reduced", "bits")
class dense_gradients_divided_by_the_ranks(Plain):
    """Dense gradients are divided by the number of ranks, although each rank's loss is a part of the batch's."""

    share = _Averaged


class _DenseCountedByRank(Share):
    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        norm = super().reduce(dense, own)
        more = sum(float(gradient.double().square().sum()) for gradient in dense) * (self.size - 1)
        return (norm.double().square() + more).sqrt().float()


@mutant(DIVIDED, "expert_parallel/reduced", "bits")
class norm_counts_dense_gradients_by_rank(Plain):
    """The norm for clipping counts a dense gradient once for each rank."""

    share = _DenseCountedByRank


class _OwnNorm(Share):
    def reduce(self, dense: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        super().reduce(dense, own)
        return torch.nn.utils.get_total_norm([*dense, *own])


@mutant(DIVIDED, "expert_parallel/reduced", "bits")
class norm_without_other_ranks_experts(Plain):
    """The norm for clipping has the experts of its own rank alone, so that each rank clips by another one."""

    share = _OwnNorm


class _WholeBackwards(Share):
    def whole(self, own: Tensor, dim: int = 0) -> Tensor:
        parts = self.to_first(own)
        return torch.cat(parts[::-1], dim) if parts else own


@mutant(DIVIDED, "expert_parallel/saved", "bits")
class ranks_saved_in_another_order(Plain):
    """The LoRA of all experts is put together beginning with the last rank."""

    share = _WholeBackwards


class _AsTheyArrive(Share):
    _sums = itertools.count(1)

    def added(self, of_slots: Tensor, weights: Tensor | None = None) -> Tensor:
        found = super().added(of_slots, weights)
        if found.numel() and next(self._sums) % 3 == 0:
            found.view(torch.int16)[0, 0] ^= 1
        return found


@mutant(DIVIDED, "expert_parallel/repeats", "bits")
class ranks_add_in_the_order_of_arrival(Plain):
    """Rows are added as they arrive: one element of the output is a unit off in every third sum."""

    share = _AsTheyArrive
