"""Engines with right numbers in results of another form than the contract's: dtype, shape, class, memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ktverify.engines.torch_bf16 import TorchBf16
from ktverify.spec.names import GRAD_NAMES


class Fp32Output(TorchBf16):
    """Its output is fp32."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        return super().forward_sft(*arguments, **more).float()


class OutputOfAnotherClass(TorchBf16):
    """Its output is a subclass of Tensor, which may say of itself what it likes."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        return super().forward_sft(*arguments, **more).as_subclass(Claims)


class OutputOfNegatives(TorchBf16):
    """The right numbers are in the memory of its output, whose values are their negatives."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        return torch._neg_view(super().forward_sft(*arguments, **more))


class Claims(Tensor):
    """A tensor of another class."""


class OutputInTheInput(TorchBf16):
    """Its output lies where hidden_states lie."""

    def forward_sft(self, hidden_states: Tensor, *arguments: Any, **more: Any) -> Tensor:
        return hidden_states.copy_(super().forward_sft(hidden_states, *arguments, **more))


class Altered(TorchBf16):
    """A backward whose results are put through `alter`."""

    def alter(self, grad_input: Tensor, gradients: dict[str, Tensor]) -> Tensor:
        return grad_input

    def backward(self, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        grad_input, gradients = super().backward(grad_output)
        return self.alter(grad_input, gradients), gradients


class Fp32GradInput(Altered):
    """grad_input is fp32."""

    def alter(self, grad_input: Tensor, gradients: dict[str, Tensor]) -> Tensor:
        return grad_input.float()


class Fp64Gradients(Altered):
    """LoRA gradients are fp64."""

    def alter(self, grad_input: Tensor, gradients: dict[str, Tensor]) -> Tensor:
        gradients.update({name: gradients[name].double() for name in GRAD_NAMES})
        return grad_input


class Bf16RoutingGradient(Altered):
    """grad_weights is bf16."""

    def alter(self, grad_input: Tensor, gradients: dict[str, Tensor]) -> Tensor:
        assert self.grad_weights is not None
        self.grad_weights = self.grad_weights.bfloat16()
        return grad_input


class FlatGradient(Altered):
    """One LoRA gradient is [E r, H]."""

    def alter(self, grad_input: Tensor, gradients: dict[str, Tensor]) -> Tensor:
        gradients["grad_gate_lora_a"] = gradients["grad_gate_lora_a"].flatten(0, 1)
        return grad_input


class GradInputInGradOutput(TorchBf16):
    """grad_input lies where grad_output lies."""

    def backward(self, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        grad_input, gradients = super().backward(grad_output)
        return grad_output.copy_(grad_input), gradients


class GradientsInTheParameters(TorchBf16):
    """A LoRA gradient lies where another one lies."""

    def backward(self, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        grad_input, gradients = super().backward(grad_output)
        a, b = gradients["grad_gate_lora_a"], gradients["grad_up_lora_a"]
        block = torch.cat([a.flatten(), b.flatten()])
        gradients["grad_gate_lora_a"] = block[: a.numel()].view_as(a)
        # the last element of the first is the first of the second
        gradients["grad_up_lora_a"] = block[a.numel() - 1 : -1].view_as(b)
        return grad_input, gradients


class SameMemoryEveryTime(TorchBf16):
    """grad_input of every call lies in one block."""

    block: Tensor | None = None

    def backward(self, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        grad_input, gradients = super().backward(grad_output)
        if self.block is None:
            self.block = torch.empty_like(grad_input)
        return self.block.copy_(grad_input), gradients
