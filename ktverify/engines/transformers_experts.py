"""transformers_experts: the experts of transformers' Qwen3-MoE, its loop over experts, with LoRA as peft adds it.

peft adds LoRA on a tensor of all experts to the weights, W + s B A in bf16, before the model's own code runs. The
calls, the refusals and their order are those of torch_bf16; the arithmetic is transformers'. Needs transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ktverify.engines.torch_bf16 import Saved, TorchBf16, memory_error
from ktverify.spec.names import LORA_NAMES

ENGINE = "TransformersExperts"


@dataclass(kw_only=True)
class _SavedCall(Saved):
    """An outstanding forward: output [T, H], and x, the routing weights and six LoRA tensors as leaves."""

    output: torch.Tensor
    leaves: list[torch.Tensor]


class TransformersExperts(TorchBf16):
    """A layer as TorchBf16 has it; NotImplementedError for dropout, which peft refuses on a tensor of all experts, and
    for a backward without LoRA, because LoRA is in the weights."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.spec.lora_dropout:
            raise NotImplementedError("lora_dropout: peft has none for LoRA on a tensor of all experts")
        if not self.spec.lora_backward:
            raise NotImplementedError(f"method {self.spec.method}: LoRA is in the weights of a backward too")
        config = Qwen3MoeConfig(
            num_experts=self.spec.num_experts,
            hidden_size=self.spec.hidden_size,
            moe_intermediate_size=self.spec.moe_intermediate_size,
        )
        config._experts_implementation = "eager"
        # every call brings the weights
        with torch.device("meta"):
            self._experts = Qwen3MoeExperts(config)

    def load_weights_from_tensors(
        self, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor, physical_map: torch.Tensor
    ) -> None:
        """As TorchBf16. gate_proj and up_proj are copied into one tensor [E, 2 I, H], the model's gate_up_proj."""
        super().load_weights_from_tensors(gate_proj, up_proj, down_proj, physical_map)
        with memory_error():
            gate, up, down = (tensor.detach()[self._slot_of] for tensor in self._base)
            self._base = (torch.cat([gate, up], dim=1), down)

    def _forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, save: bool
    ) -> torch.Tensor:
        lora = [self._lora[name].detach().requires_grad_(save) for name in LORA_NAMES]
        # detached: the caller's tensors must not begin to require a gradient
        x, w = (tensor.detach().requires_grad_(save) for tensor in (hidden_states, weights))
        # transformers' mark of a slot that another process computes is E
        ids = expert_ids.masked_fill(expert_ids < 0, self.spec.num_experts)
        with torch.set_grad_enabled(save):
            output: torch.Tensor = functional_call(self._experts, self._with_lora(lora), (x, ids, w))
        if save:
            self._saved.append(_SavedCall(len(x), expert_ids.shape, lora[0].dtype, output=output, leaves=[x, w, *lora]))
        return output.detach()

    def _with_lora(self, lora: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of the model's module: gate_up_proj [E, 2 I, H] and down_proj [E, H, I] in bf16."""
        gate_a, gate_b, up_a, up_b, down_a, down_b = lora

        def added(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
            return (base + delta * self.spec.scaling).to(base.dtype)

        gate_up, down = self._base
        return {
            "gate_up_proj": added(gate_up, torch.cat([gate_b @ gate_a, up_b @ up_a], dim=1)),
            "down_proj": added(down, down_b @ down_a),
        }

    def _backward(self, saved: Saved, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert isinstance(saved, _SavedCall)
        # where no slot has an expert, the output has no graph
        found = (
            torch.autograd.grad(saved.output, saved.leaves, grad_output)
            if saved.output.requires_grad
            else tuple(torch.zeros_like(leaf) for leaf in saved.leaves)
        )
        grad_input, self.grad_weights, *d_lora = found
        return grad_input, {f"grad_{name}": gradient for name, gradient in zip(LORA_NAMES, d_lora, strict=True)}
