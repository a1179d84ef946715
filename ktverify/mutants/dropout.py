"""Mutants of dropout: right engines as long as lora_dropout is 0, but for one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.judge.reference import OfRows
from ktverify.mutants.base import Gradients, Group, Plain, mutant


@mutant(Cause.DROPOUT, "dropout/evaluation", "bits")
class dropout_without_saving(Plain):
    """Forwards without save_for_backward drop as well."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        output = super()._forward(hidden_states, expert_ids, weights, True)
        if not save:
            self._saved.pop()
        return output


@mutant(Cause.DROPOUT, "dropout/elements", "masks")
class dropout_per_channel(Plain):
    """All tokens of an expert have the mask of the first one."""

    def _masks(self, slots: int) -> OfRows:
        gate, up, down = (None if mask is None else mask[:1].expand_as(mask) for mask in super()._masks(slots))
        return gate, up, down


@mutant(Cause.DROPOUT, "dropout/elements", "masks")
class dropout_shared_by_gate_and_up(Plain):
    """gate and up drop the same elements of x."""

    def _masks(self, slots: int) -> OfRows:
        gate, _, down = super()._masks(slots)
        return gate, gate, down


@mutant(Cause.DROPOUT, "dropout/elements_of_two_parts", "masks")
class dropout_the_same_in_every_part(Plain):
    """All tensor-parallel parts of I have the mask of the first one."""

    def _masks(self, slots: int) -> OfRows:
        gate, up, down = super()._masks(slots)
        parts = self.spec.threadpool_count
        return gate, up, None if down is None else down[:, : down.shape[1] // parts].repeat(1, parts)


@mutant(Cause.DROPOUT, "dropout/elements", "masks")
class dropout_keeps_what_it_should_drop(Plain):
    """lora_dropout is taken as the probability that an element is kept."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.spec.lora_dropout:
            self.spec = dataclasses.replace(self.spec, lora_dropout=1 - self.spec.lora_dropout)


@mutant(Cause.DROPOUT, "dropout/expected_value", "masks")
class dropout_not_scaled(Plain):
    """Kept elements are not divided by 1 − p."""

    def _masks(self, slots: int) -> OfRows:
        gate, up, down = (None if mask is None else mask.ceil().clamp(max=1) for mask in super()._masks(slots))
        return gate, up, down


@mutant(Cause.DROPOUT, "dropout/same_masks_in_backward")
class dropout_drawn_again_in_backward(Plain):
    """The backward draws masks of its own."""

    def backward_of(self, at: Group, d_out: Tensor) -> tuple[Tensor, Gradients]:
        at.masks = self.drawn(at)
        return super().backward_of(at, d_out)


@mutant(Cause.DROPOUT, "dropout/same_masks_in_backward")
class dropout_missing_in_grad_input(Plain):
    """The gradients of x and h do not pass through the masks."""

    def through_dropout(self, at: Group, name: str, gradient: Tensor) -> Tensor:
        return gradient


@mutant(Cause.DROPOUT, "dropout/same_masks_in_backward")
class dropout_of_the_base_too(Plain):
    """The base's operand h is dropped with LoRA's."""

    def down(self, at: Group) -> None:
        if at.masks:
            at.h, at.masks["down"] = self.lora_input(at, "down", at.h), torch.ones_like(at.h)
        super().down(at)


@mutant(Cause.DROPOUT, "dropout/next_forward", "masks")
class dropout_the_same_every_time(Plain):
    """Every forward sets the same seed."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return super()._forward(hidden_states, expert_ids, weights, save)


@mutant(Cause.DROPOUT, "dropout/seed", "bits")
class dropout_ignores_the_seed(Plain):
    """Masks are seeded by the machine, not by torch.manual_seed."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.seed()
            return super()._forward(hidden_states, expert_ids, weights, save)


@mutant(Cause.DROPOUT, "dropout/seed", "bits")
class dropout_seeded_by_thread(Plain):
    """Each thread takes a seed from torch's generator, so the masks depend on how many there are."""

    def _masks(self, slots: int) -> OfRows:
        if self.spec.lora_dropout:
            torch.rand(self.spec.cpuinfer_threads)
        return super()._masks(slots)


@mutant(Cause.DROPOUT, "dropout/zero", "bits")
class dropout_of_zero_is_the_default(Plain):
    """lora_dropout=0 counts as not given, and becomes 0.05."""

    def __init__(self, **arguments: Any) -> None:
        if arguments.get("lora_dropout") == 0:
            arguments["lora_dropout"] = 0.05
        super().__init__(**arguments)
