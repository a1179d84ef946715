"""Mutants of routing: weights and their gradient, slots, ids, and experts or tokens that are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.engines import argument_checks
from ktverify.judge.reference import routed
from ktverify.mutants.base import Gradients, Group, Plain, mutant

Routes = Iterator[tuple[int, Tensor, Tensor]]

# ---- weights


@mutant(Cause.ROUTING_WEIGHT, "backward/small")
class no_routing_weight_in_backward(Plain):
    """dy = dO instead of w dO."""

    def weighted(self, at: Group, d_out: Tensor) -> Tensor:
        return d_out


@mutant(Cause.ROUTING_WEIGHT, "forward/small")
class no_routing_weight(Plain):
    """The experts' outputs are added up with weight 1."""

    def combine(self, output: Tensor, at: Group) -> None:
        output.index_add_(0, at.rows, at.y)


@mutant(Cause.ROUTING_WEIGHT, "forward/small")
class routing_weights_normalised(Plain):
    """The engine divides the routing weights of each token by their sum, which is the task of the caller."""

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        return super().groups(hidden_states, expert_ids, weights / weights.sum(1, keepdim=True))


@mutant(Cause.ROUTING_WEIGHT, "backward/small")
class routing_weight_twice_in_down(Plain):
    """The gradients of the LoRA of down have the routing weight twice."""

    def down_gradients(self, at: Group, dy: Tensor) -> tuple[Tensor, Gradients]:
        return super().down_gradients(at, dy)[0], super().down_gradients(at, dy * at.w)[1]


@mutant(Cause.ROUTING_WEIGHT, "backward/small")
class routing_gradient_zero(Plain):
    """The gradient of the routing weights is zero."""

    def routing_gradient(self, at: Group, d_out: Tensor) -> Tensor:
        return torch.zeros(len(d_out))


@mutant(Cause.ROUTING_WEIGHT, "backward/small")
class routing_gradient_weighted(Plain):
    """dw uses w y instead of y."""

    def routing_gradient(self, at: Group, d_out: Tensor) -> Tensor:
        return super().routing_gradient(at, d_out) * at.w.squeeze(1)


# ---- slots


@mutant(Cause.SLOT_WRONG, "forward/small")
class weight_of_the_opposite_slot(Plain):
    """A token's routing weights are taken in reverse order."""

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        return super().groups(hidden_states, expert_ids, weights.flip(1))


@mutant(Cause.SLOT_WRONG, "forward/small")
class last_slot_dropped(Plain):
    """The sum over a token's slots stops at k - 1."""

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        last = torch.arange(expert_ids.shape[1]) == expert_ids.shape[1] - 1
        return super().groups(hidden_states, torch.where(last, -1, expert_ids), weights)


@mutant(Cause.SLOT_WRONG, "backward/small")
class h_of_another_row(Plain):
    """The gradient of down_lora_a uses h of the previous row."""

    def down_gradients(self, at: Group, dy: Tensor) -> tuple[Tensor, Gradients]:
        dh, found = super().down_gradients(at, dy)
        if found:
            dy_db = self.product(dy, at.lora["down_lora_b"])
            found["grad_down_lora_a"] = self.s * self.over_rows(dy_db, at.h.roll(1, 0))
        return dh, found


@mutant(Cause.SLOT_WRONG, "backward/small")
class routing_gradient_in_the_opposite_slot(Plain):
    """dw is stored from the last slot to the first."""

    def finish(self, gradients: Gradients, grad_weights: Tensor) -> None:
        super().finish(gradients, grad_weights.flip(1))


# ---- ids


@mutant(Cause.IDS, "forward/duplicate_expert")
class duplicate_counted_once(Plain):
    """An expert that a token has twice counts once."""

    def routes(self, expert_ids: Tensor) -> Routes:
        for expert, rows, slots in routed(expert_ids):
            first = torch.ones(len(rows), dtype=torch.bool)
            first[1:] = rows[1:] != rows[:-1]
            yield expert, rows[first], slots[first]


@mutant(Cause.IDS, "forward/masked_slots")
class masked_slot_is_the_last_expert(Plain):
    """An id of -1 is used as an index, which selects expert E - 1."""

    def routes(self, expert_ids: Tensor) -> Routes:
        return routed(torch.where(expert_ids < 0, self.spec.num_experts - 1, expert_ids))


@mutant(Cause.IDS, "refusals/expert id 6", "refusal")
class ids_clamped(Plain):
    """An expert id that does not exist is clamped to the nearest one."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Any, *rest: Any, **more: Any) -> Tensor:
        argument_checks.check_ready(bool(self._base), bool(self._lora), "forward_sft")
        argument_checks.check_forward(self.spec, hidden_states, expert_ids, rest[0])
        return super().forward_sft(hidden_states, expert_ids.clamp(-1, self.spec.num_experts - 1), *rest, **more)


@mutant(Cause.IDS, "refusals/expert id 6", "refusal")
class ids_out_of_range_ignored(Plain):
    """An expert id that does not exist is ignored without an error."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Any, *rest: Any, **more: Any) -> Tensor:
        argument_checks.check_ready(bool(self._base), bool(self._lora), "forward_sft")
        argument_checks.check_forward(self.spec, hidden_states, expert_ids, rest[0])
        there = (expert_ids >= 0) & (expert_ids < self.spec.num_experts)
        return super().forward_sft(hidden_states, torch.where(there, expert_ids, -1), *rest, **more)


# ---- experts and tokens


@mutant(Cause.EXPERT_WRONG, "forward/small")
class last_expert_left_out(Plain):
    """The loop over experts ends at E - 2."""

    def routes(self, expert_ids: Tensor) -> Routes:
        return (route for route in routed(expert_ids) if route[0] < self.spec.num_experts - 1 or route[0] == 0)


@mutant(Cause.TOKEN_TAIL, "forward/zipf")
class capacity_drops_tokens(Plain):
    """An expert computes at most twice its fair share of the slots, but at least 16: a capacity factor of 2."""

    def routes(self, expert_ids: Tensor) -> Routes:
        room = max(16, 2 * expert_ids.numel() // self.spec.num_experts)
        for expert, rows, slots in routed(expert_ids):
            yield expert, rows[:room], slots[:room]


@mutant(Cause.TOKEN_TAIL, "forward/tokens_300")
class rows_beyond_256_repeat(Plain):
    """The row index within an expert has eight bits: rows beyond the 256th compute with the first ones."""

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        groups = super().groups(hidden_states, expert_ids, weights)
        for at in groups:
            at.x = at.x[torch.arange(len(at.x)) % 256]
        return groups


@mutant(Cause.TOKEN_TAIL, "forward/small")
class last_token_left_out(Plain):
    """The loop over tokens ends at T - 2, where there are two or more."""

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        ids = expert_ids.clone()
        if len(ids) > 1:
            ids[-1] = -1
        return super().groups(hidden_states, ids, weights)


@mutant(Cause.TOKEN_TAIL, "backward/tokens_17")
class row_remainder_lost_in_gradients(Plain):
    """Sums over the rows of an expert leave out the rows after the last whole block of 16."""

    def over_rows(self, a: Tensor, b: Tensor) -> Tensor:
        whole = len(a) // 16 * 16 if len(a) > 16 else len(a)
        return a[:whole].T @ b[:whole]


@mutant(Cause.OTHER, "behaviour/outlier_token", "mean_rel")
class small_rows_taken_for_padding(Plain):
    """Tokens whose elements are all below 1/16 of the batch's largest count as padding: their output stays zero."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        size = torch.where(torch.isfinite(hidden_states), hidden_states, 0).float().abs()
        output = super()._forward(hidden_states, expert_ids, weights, save)
        if size.numel():
            output[size.amax(1) < size.max() / 16] = 0
        return output
