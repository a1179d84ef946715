"""Mutants of matrices: exchanged, transposed, interleaved, of another expert; gradients stored in the wrong place."""

from __future__ import annotations

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.mutants.base import Gradients, Group, Matrices, Plain, mutant


def misread(matrix: Tensor) -> Tensor:
    """[p, q] whose memory is read as [q, p] and transposed."""
    return matrix.contiguous().view(matrix.shape[1], matrix.shape[0]).T


@mutant(Cause.EXCHANGED_PROJECTION, "forward/small")
class gate_up_exchanged(Plain):
    """silu is applied to the up projection."""

    def base_of(self, expert: int) -> Matrices:
        gate, up, down = super().base_of(expert)
        return up, gate, down


@mutant(Cause.EXCHANGED_PROJECTION, "forward/small")
class gate_up_lora_a_exchanged(Plain):
    """gate computes with the LoRA A of up, and up with that of gate."""

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        lora = super().lora_of(expert)
        return {**lora, "gate_lora_a": lora["up_lora_a"], "up_lora_a": lora["gate_lora_a"]}


@mutant(Cause.EXCHANGED_PROJECTION, "backward/small")
class gate_up_gradients_exchanged(Plain):
    """The gradients of gate_lora_a and up_lora_a are exchanged; their shapes are equal."""

    def lora_gradients(self, found: Gradients) -> Gradients:
        gate, up = found["grad_gate_lora_a"], found["grad_up_lora_a"]
        return {**found, "grad_gate_lora_a": up, "grad_up_lora_a": gate}


@mutant(Cause.TRANSPOSED, "forward/small")
class up_lora_a_misread(Plain):
    """up_lora_a [r, H] is read as [H, r]."""

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        lora = super().lora_of(expert)
        return {**lora, "up_lora_a": misread(lora["up_lora_a"])}


@mutant(Cause.TRANSPOSED, "forward/small")
class down_misread(Plain):
    """down_proj [H, I] is read as [I, H]."""

    def base_of(self, expert: int) -> Matrices:
        gate, up, down = super().base_of(expert)
        return gate, up, misread(down)


@mutant(Cause.TRANSPOSED, "backward/small")
class down_b_gradient_transposed(Plain):
    """The gradient of down_lora_b is written as [r, H] into a tensor of [H, r]."""

    def lora_gradients(self, found: Gradients) -> Gradients:
        value = found["grad_down_lora_b"]
        return {**found, "grad_down_lora_b": value.T.contiguous().view(value.shape)}


@mutant(Cause.MEMORY_LAYOUT, "forward/small")
class fused_gate_up_halved(Plain):
    """gate and up are fused row by row and split by halves."""

    def base_of(self, expert: int) -> Matrices:
        gate, up, down = super().base_of(expert)
        fused = torch.stack([gate, up], 1).view(-1, gate.shape[1])
        return fused[: len(gate)], fused[len(gate) :], down


@mutant(Cause.EXPERT_PERMUTATION, "forward/small")
class expert_off_by_one(Plain):
    """Every token is computed by the expert after its own."""

    def base_of(self, expert: int) -> Matrices:
        return super().base_of((expert + 1) % self.spec.num_experts)

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        return super().lora_of((expert + 1) % self.spec.num_experts)


@mutant(Cause.EXPERT_PERMUTATION, "forward/small")
class lora_of_the_next_expert(Plain):
    """Each expert uses the LoRA of the expert after it."""

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        return super().lora_of((expert + 1) % self.spec.num_experts)


@mutant(Cause.EXPERT_PERMUTATION, "backward/small")
class gradients_one_expert_on(Plain):
    """The LoRA gradients of each expert are stored at the expert after it."""

    def keep(self, gradients: Gradients, at: Group, found: Gradients) -> None:
        for name, gradient in found.items():
            gradients[name][(at.expert + 1) % self.spec.num_experts] = self.stored(gradient, gradients[name].dtype)


@mutant(Cause.EXPERT_PERMUTATION, "forward/small")
class experts_0_and_1_exchanged(Plain):
    """Experts 0 and 1 have each other's base weights."""

    def base_of(self, expert: int) -> Matrices:
        other = {0: 1, 1: 0}.get(expert, expert)
        return super().base_of(other if other < self.spec.num_experts else expert)


@mutant(Cause.EXPERT_PERMUTATION, "forward/permuted_slots")
class physical_map_ignored(Plain):
    """Slot p is used for expert p, regardless of physical_map."""

    def base_of(self, expert: int) -> Matrices:
        gate, up, down = (tensor[expert].float() for tensor in self._base)
        return gate, up, down


@mutant(Cause.EXPERT_PERMUTATION, "forward/permuted_slots")
class physical_map_inverted(Plain):
    """physical_map is read as the slot of each expert, not as the expert in each slot."""

    def base_of(self, expert: int) -> Matrices:
        slot = self._slot_of.index(expert)
        gate, up, down = (tensor[slot].float() for tensor in self._base)
        return gate, up, down


@mutant(Cause.EXPERT_WRONG, "forward/small")
class base_of_expert_3_is_halved(Plain):
    """The down projection of expert 3 is halved."""

    def base_of(self, expert: int) -> Matrices:
        gate, up, down = super().base_of(expert)
        return gate, up, down / 2 if expert == 3 else down
