"""kt-kernel 0.7.2's KTMoEWrapper with the contract's calls. Runs under kt-kernel's Python: imports nothing of ktverify.

What differs, and what is done about it here:
- forward_sft is called `forward`, and backward gives (grad_input, grad_weights); it writes the LoRA gradients into
  buffers that init_lora_weights was given. Copies of them are returned.
- Its expert_ids name physical slots and its physical_to_logical_map says which of the given experts a slot takes, so
  weights that come by slot are put into the experts' order.
- LoRA tensors have to be contiguous; it keeps their addresses.
- One buffer is shared by all layers of a process and grows with the tokens only, since all layers of a model have the
  same sizes. It is cleared, by the call that is there for it, when another layer's turn comes.
Nothing is checked or mended beyond that: what kt-kernel accepts, refuses or computes is its own.
"""

from __future__ import annotations

from typing import Any

import torch
from kt_kernel import KTMoEWrapper  # type: ignore[import-not-found]

NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class KtKernel:
    """A layer of E experts; shapes and dtypes as in CONTRACT.md. LoRA in bf16 only."""

    _turn: object = None

    def __init__(self, **arguments: Any) -> None:
        self._layer = KTMoEWrapper(gpu_experts_mask=None, **arguments)
        self._gradients: dict[str, torch.Tensor] = {}
        self.grad_weights: torch.Tensor | None = None

    def load_weights_from_tensors(
        self, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor, physical_map: torch.Tensor
    ) -> None:
        weights = [gate_proj, up_proj, down_proj]
        experts = torch.arange(self._layer.num_experts)
        if sorted(physical_map.flatten().tolist()) == experts.tolist() and not torch.equal(physical_map, experts):
            slot_of = torch.argsort(physical_map)
            weights, physical_map = [tensor[slot_of] for tensor in weights], experts
        self._layer.load_weights_from_tensors(*weights, physical_map)

    def init_lora_weights(self, *parameters: torch.Tensor) -> None:
        if all(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 for tensor in parameters):
            raise NotImplementedError("LoRA in float32: kt-kernel says that it must use torch.bfloat16")
        parameters = tuple(tensor.contiguous() if isinstance(tensor, torch.Tensor) else tensor for tensor in parameters)
        gradients = {name: torch.zeros_like(tensor) for name, tensor in zip(NAMES, parameters, strict=True)}
        self._layer.init_lora_weights(*parameters, *gradients.values())
        self._gradients = gradients
        for name, tensor in zip(NAMES, parameters, strict=True):
            setattr(self, name, tensor)

    def update_lora_weights(self) -> None:
        for name in self._gradients:
            setattr(self._layer, name, getattr(self, name))
        self._layer.update_lora_weights()

    def forward_sft(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> torch.Tensor:
        self._take_turn()
        output: torch.Tensor = self._layer.forward(hidden_states, expert_ids, weights, save_for_backward)
        return output

    def backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._take_turn()
        grad_input, self.grad_weights = self._layer.backward(grad_output)
        return grad_input, {f"grad_{name}": tensor.clone() for name, tensor in self._gradients.items()}

    def _take_turn(self) -> None:
        if KtKernel._turn is not self._layer:
            self.clear_sft_buffer_cache()
            KtKernel._turn = self._layer

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        KTMoEWrapper.clear_sft_buffer_cache()
