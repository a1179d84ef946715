"""kt-kernel 0.7.2's KTMoEWrapper with the contract's calls. Runs under kt-kernel's Python: imports nothing of ktverify.

The differences, and what this adapter does about each:
- forward_sft is called `forward`, and backward returns (grad_input, grad_weights); it writes the LoRA gradients into
  buffers that init_lora_weights got. The adapter returns copies of them.
- Its expert_ids are physical slots, and its physical_to_logical_map gives the expert that a slot takes. The adapter
  puts weights by slot into the order of the experts.
- LoRA tensors have to be contiguous; it keeps their addresses.
- Its errors name its own calls and arguments; the adapter replaces them by forward_sft and physical_map.
- All layers of a process share one buffer that grows with the tokens only, because all layers of a model have the same
  sizes. The adapter clears it, by kt-kernel's own call, whenever another layer computes.
It checks and repairs nothing else: kt-kernel's results and refusals are its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from kt_kernel import KTMoEWrapper  # type: ignore[import-not-found]

# kt-kernel's words, and the contract's
WORDS = {"forward(": "forward_sft(", "physical_to_logical_map_cpu": "physical_map"}
NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class KtKernel:
    """A layer of E experts; shapes and dtypes as in docs/contract.md. LoRA in bf16 only."""

    _turn: object = None

    def __init__(self, **arguments: Any) -> None:
        self.wrapped = KTMoEWrapper(gpu_experts_mask=None, **arguments)
        self._gradients: dict[str, torch.Tensor] = {}
        self.grad_weights: torch.Tensor | None = None

    def load_weights_from_tensors(
        self, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor, physical_map: torch.Tensor
    ) -> None:
        weights = [gate_proj, up_proj, down_proj]
        if _exchanges(physical_map, self.wrapped.num_experts):
            slot_of = torch.argsort(physical_map)
            weights, physical_map = [tensor[slot_of] for tensor in weights], torch.arange(len(slot_of), device="cpu")
        with _contract_words():
            self.wrapped.load_weights_from_tensors(*weights, physical_map)

    def init_lora_weights(self, *parameters: torch.Tensor) -> None:
        if all(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 for tensor in parameters):
            raise NotImplementedError("LoRA in float32: kt-kernel says that it must use torch.bfloat16")
        parameters = tuple(tensor.contiguous() if isinstance(tensor, torch.Tensor) else tensor for tensor in parameters)
        # other objects are passed on unchanged: kt-kernel itself has to refuse them
        buffers = [torch.zeros_like(t) if isinstance(t, torch.Tensor) else t for t in parameters]
        gradients = dict(zip(NAMES, buffers, strict=True))
        self.wrapped.init_lora_weights(*parameters, *gradients.values())
        self._gradients = gradients
        for name, tensor in zip(NAMES, parameters, strict=True):
            setattr(self, name, tensor)

    def update_lora_weights(self) -> None:
        for name in self._gradients:
            setattr(self.wrapped, name, getattr(self, name))
        self.wrapped.update_lora_weights()

    def forward_sft(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> torch.Tensor:
        self._take_turn()
        with _contract_words():
            output: torch.Tensor = self.wrapped.forward(hidden_states, expert_ids, weights, save_for_backward)
        return output

    def backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._take_turn()
        with _contract_words():
            grad_input, self.grad_weights = self.wrapped.backward(grad_output)
        return grad_input, {f"grad_{name}": tensor.clone() for name, tensor in self._gradients.items()}

    def _take_turn(self) -> None:
        if KtKernel._turn is not self.wrapped:
            self.clear_sft_buffer_cache()
            KtKernel._turn = self.wrapped

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        KTMoEWrapper.clear_sft_buffer_cache()


def _exchanges(physical_map: Any, experts: int) -> bool:
    """True for a map int64 [E] of all experts in another order than theirs; False also for what is no map."""
    if not isinstance(physical_map, torch.Tensor) or physical_map.dtype != torch.int64 or physical_map.dim() != 1:
        return False
    slots = physical_map.tolist()
    return slots != sorted(slots) and sorted(slots) == list(range(experts))


@contextlib.contextmanager
def _contract_words() -> Iterator[None]:
    """In the body, put the contract's names into the text of kt-kernel's errors, which keep their class."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        text = str(error)
        for its, ours in WORDS.items():
            text = text.replace(its, ours)
        raise type(error)(text) from error
