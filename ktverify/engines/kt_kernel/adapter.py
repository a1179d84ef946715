"""kt-kernel 0.7.2's KTMoEWrapper with the contract's calls. Runs under kt-kernel's Python: imports nothing of ktverify.

The differences, and what this adapter does about each:
- forward_sft is called `forward`, and backward returns (grad_input, grad_weights); it writes the LoRA gradients into
  buffers that init_lora_weights got. The adapter returns copies of them.
- Its expert_ids are physical slots, and its physical_to_logical_map gives the expert that a slot takes. The adapter
  puts weights by slot into the order of the experts.
- LoRA tensors have to be contiguous; it keeps their addresses.
- Its errors name its own calls and arguments; the adapter replaces them by forward_sft and physical_map.
- Its builds for CPUs without AVX512-BF16 and AMX have no training. The adapter says so as NotImplementedError.
- Codes of FP8 go to its load_block_fp8_weights. It takes none of INT8: its Python reads .kt files alone, and its kernel
  makes codes of bf16. The adapter gives it the bf16 weights that the codes stand for. Other codes are
  NotImplementedError: its int4 of the contract's name makes codes of bf16 as well, and its MXFP4 clamps.
- All layers of a process share one buffer that grows with the tokens only, because all layers of a model have the same
  sizes. The adapter clears it, by kt-kernel's own call, whenever another layer computes.
- Its FP8 layers need a layer_idx of their own: the backward of a second layer of one index reads at a null pointer.
  The adapter numbers them.
It checks and repairs nothing else: kt-kernel's results and refusals are its own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import kt_kernel  # type: ignore[import-not-found]
import torch
from kt_kernel import KTMoEWrapper

# kt-kernel's words, and the contract's
WORDS = {"forward(": "forward_sft(", "physical_to_logical_map_cpu": "physical_map"}
NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class KtKernel:
    """A layer of E experts; shapes and dtypes as in docs/contract.md. LoRA in bf16 only."""

    _turn: object = None
    _numbers = itertools.count()

    def __init__(self, **arguments: Any) -> None:
        self.method = str(arguments.get("method", "AMXBF16_SFT"))
        if self.method.startswith("AMXFP8"):
            arguments["layer_idx"] = next(KtKernel._numbers)
        try:
            self.wrapped = KTMoEWrapper(gpu_experts_mask=None, **arguments)
        except RuntimeError as error:
            if "not available" not in str(error):
                raise
            build = getattr(kt_kernel, "__cpu_variant__", "unknown")
            text = f"{self.method}: kt-kernel's build for this CPU ({build}) has no such training"
            raise NotImplementedError(f"{text}, which needs AVX512-BF16 or AMX") from error
        self._gradients: dict[str, torch.Tensor] = {}
        self.grad_weights: torch.Tensor | None = None

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_map: torch.Tensor,
        scales: Any = None,
        zero_points: Any = None,
    ) -> None:
        name = self.method.partition("_")[0]
        if scales is None and name == "AMXFP8":
            raise NotImplementedError("AMXFP8_SFT without scales: kt-kernel makes no FP8 of bf16 weights")
        if zero_points is not None or (scales is not None and name not in ("AMXFP8", "AMXINT8")):
            raise NotImplementedError(f"codes for {self.method}: kt-kernel takes those of FP8 and INT8 alone")
        weights, scales = [gate_proj, up_proj, down_proj], list(scales or ())
        if _exchanges(physical_map, self.wrapped.num_experts):
            slot_of = torch.argsort(physical_map)
            weights, scales = ([tensor[slot_of] for tensor in tensors] for tensors in (weights, scales))
            physical_map = torch.arange(len(slot_of), device="cpu")
        with _contract_words():
            if name == "AMXFP8":
                pairs = zip(weights, scales, strict=True)
                parts = [list(tensor.contiguous().unbind(0)) for pair in pairs for tensor in pair]
                # builds without training lack this module
                from kt_kernel.sft.weights import BlockFP8ExpertWeights  # type: ignore[import-not-found]

                self.wrapped.share_backward_bb = True  # without it, its kernel refuses FP8
                self.wrapped.load_block_fp8_weights(BlockFP8ExpertWeights(*parts), physical_map)
            elif name == "AMXINT8":
                pairs = zip(weights, scales or [None] * 3, strict=True)
                bf16 = [w if s is None else (w.float() * s[..., None]).bfloat16() for w, s in pairs]
                # its load_weights_from_tensors refuses them; its kernel takes them
                self.wrapped.gate_proj, self.wrapped.up_proj, self.wrapped.down_proj = (w.contiguous() for w in bf16)
                self.wrapped.load_weights(physical_map)
            else:
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
