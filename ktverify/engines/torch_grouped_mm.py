"""torch_grouped_mm: the layer as torch.nn.functional.grouped_mm computes it, all experts in one call; autograd.

Calls, refusals and their order are those of torch_bf16; this file has the arithmetic. grouped_mm requires rows of a
multiple of 16 bytes: another rank is padded with zeros, other sizes are refused with NotImplementedError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ktverify.engines.torch_bf16 import Saved, TorchBf16
from ktverify.judge.reference import OfRows
from ktverify.spec.names import LORA_NAMES

# elements of bf16 in 16 bytes
MULTIPLE = 8

ENGINE = "TorchGroupedMm"


@dataclass(kw_only=True)
class _SavedBatch(Saved):
    """An outstanding forward of n token slots: rows, slots [n], w y [n, H], and x, w and six LoRA tensors as leaves."""

    row: torch.Tensor
    slot: torch.Tensor
    y: torch.Tensor
    leaves: list[torch.Tensor]


class TorchGroupedMm(TorchBf16):
    """A layer as TorchBf16 has it; NotImplementedError where hidden or intermediate is no multiple of 8."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for name, size in (("hidden", self.spec.hidden_size), ("intermediate", self.spec.moe_intermediate_size)):
            if size % MULTIPLE:
                raise NotImplementedError(f"{name} {size}: torch's grouped_mm takes multiples of {MULTIPLE} in bf16")

    def load_weights_from_tensors(
        self, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor, physical_map: torch.Tensor
    ) -> None:
        """As TorchBf16. The weights are put into the experts' order and made contiguous, as grouped_mm requires.

        gate_proj and up_proj are copied into one tensor [E, 2 I, H], so that one call multiplies by both.
        """
        super().load_weights_from_tensors(gate_proj, up_proj, down_proj, physical_map)
        if self._slot_of != list(range(len(self._slot_of))):
            self._base = tuple(tensor[self._slot_of] for tensor in self._base)
        gate, up, down = self._base
        self._base = (torch.cat([gate.detach(), up.detach()], dim=1), down.detach().contiguous())

    def _forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, save: bool
    ) -> torch.Tensor:
        trained = self.spec.lora_backward
        order = torch.argsort(expert_ids.reshape(-1), stable=True)
        # slots of id -1 come first
        order = order[int((expert_ids < 0).sum()) :]
        row = order // expert_ids.shape[1]
        slot = order % expert_ids.shape[1]
        counts = torch.bincount(expert_ids.reshape(-1)[order], minlength=self.spec.num_experts)
        lora = [self._lora[name].detach().requires_grad_(save and trained) for name in LORA_NAMES]
        x = hidden_states[row].requires_grad_(save)
        w = weights[row, slot].to(torch.bfloat16).requires_grad_(save)
        with torch.set_grad_enabled(save):
            masks = self._masks(len(row)) if save else (None, None, None)
            y = self._experts(x, lora, masks, torch.cumsum(counts, 0).int()) * w.unsqueeze(1)
        output = torch.zeros(hidden_states.shape, dtype=torch.bfloat16, device="cpu").index_add_(0, row, y.detach())
        if save:
            sizes = (len(hidden_states), expert_ids.shape, lora[0].dtype)
            self._saved.append(_SavedBatch(*sizes, row=row, slot=slot, y=y, leaves=[x, w, *lora]))
        return output

    def _experts(self, x: torch.Tensor, lora: list[torch.Tensor], masks: OfRows, ends: torch.Tensor) -> torch.Tensor:
        """[n, H] of x [n, H], rows sorted by expert; masks: of dropout; ends [E]: where each expert's rows end."""

        def product(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return functional.grouped_mm(value, weight.transpose(-2, -1), offs=ends)

        def with_lora(
            base: torch.Tensor, value: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            operand = value.to(a.dtype)
            operand = operand if mask is None else operand * mask.to(a.dtype)
            short = -a.shape[1] % MULTIPLE
            if short:
                a, b = functional.pad(a, (0, 0, 0, short)), functional.pad(b, (0, short))
            low = product(product(operand, a), b) * self.spec.scaling
            return (base + (low if self.spec.lora_backward else low.detach())).to(value.dtype)

        gate_up, down = self._base
        gate_a, gate_b, up_a, up_b, down_a, down_b = lora
        gate, up = product(x, gate_up).chunk(2, -1)
        h = functional.silu(with_lora(gate, x, gate_a, gate_b, masks[0])) * with_lora(up, x, up_a, up_b, masks[1])
        return with_lora(product(h, down), h, down_a, down_b, masks[2])

    def _backward(self, saved: Saved, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert isinstance(saved, _SavedBatch)
        wanted = [leaf for leaf in saved.leaves if leaf.requires_grad]
        dx, dw, *d_lora = torch.autograd.grad(saved.y, wanted, grad_output[saved.row])
        grad_input = torch.zeros(grad_output.shape, dtype=torch.bfloat16, device="cpu").index_add_(0, saved.row, dx)
        self.grad_weights = torch.zeros(saved.slots, dtype=torch.float32, device="cpu")
        self.grad_weights[saved.row, saved.slot] = dw.float()
        if not d_lora:
            d_lora = [torch.zeros_like(leaf) for leaf in saved.leaves[2:]]
        return grad_input, {f"grad_{name}": gradient for name, gradient in zip(LORA_NAMES, d_lora, strict=True)}
