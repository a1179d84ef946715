"""torch_bf16: the whole contract in plain torch, a bf16 loop over experts. Slow, readable, and right.

It is the engine to compare others with, to try the suites on a machine without AMX, and the base of the mutants; the
bench times it as "torch loop". This file has the calls and their order.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from ktverify.engines import argument_checks
from ktverify.judge.reference import OfRows, plain_expert, routed, zeros
from ktverify.spec.names import LORA_NAMES

ENGINE = "TorchBf16"


@dataclass
class Saved:
    """One outstanding forward: T, the shape of its weights and, per expert, (rows, slots, w y, [x, w, six LoRA])."""

    rows: int
    slots: torch.Size
    lora_dtype: torch.dtype
    graphs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict)


class TorchBf16:
    """A layer of E experts, bf16 base weights [E, I, H], [E, I, H], [E, H, I] and LoRA of rank r; see docs/contract.md.

    ValueError, TypeError and RuntimeError as its table "Refusals" lists them, before anything is computed or changed.
    threadpool_count and cpuinfer_threads are checked but change nothing: torch has its own threads. isa is ignored.
    """

    formats: tuple[str, ...] = ("bf16",)  # of base weights
    takes_mask = False  # whether another device may compute some experts

    def __init__(self, **arguments: Any) -> None:
        self.spec = argument_checks.LayerSpec(**arguments)
        if self.spec.weight_format not in self.formats:
            raise NotImplementedError(f"method is {self.spec.method!r}; this engine's base weights are bf16")
        if self.spec.num_gpu_experts and not self.takes_mask:
            raise NotImplementedError(
                f"num_gpu_experts is {self.spec.num_gpu_experts}; this engine computes all experts in one place: pass 0"
            )
        if self.spec.weight_path:
            raise ValueError(
                f"weight_path is {self.spec.weight_path!r}; this engine takes its weights from "
                "load_weights_from_tensors: pass ''"
            )
        self.layer_idx = self.spec.layer_idx
        self.isa = "torch"
        self.grad_weights: torch.Tensor | None = None
        self._base: tuple[torch.Tensor, ...] = ()
        self._slot_of: list[int] = []  # logical expert -> physical slot
        self._lora: dict[str, torch.Tensor] = {}  # the values of the last update
        self._saved: list[Saved] = []

    def load_weights_from_tensors(
        self, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor, physical_map: torch.Tensor
    ) -> None:
        """Keep gate_proj, up_proj [E, I, H], down_proj [E, H, I] bf16 by slot; physical_map int64 [E]: its experts."""
        base = argument_checks.check_base_weights(self.spec, gate_proj, up_proj, down_proj)
        slots = argument_checks.check_physical_map(self.spec, physical_map)
        self._base = tuple(base.values())
        self._slot_of = sorted(range(len(slots)), key=slots.__getitem__)

    def init_lora_weights(
        self,
        gate_lora_a: torch.Tensor,
        gate_lora_b: torch.Tensor,
        up_lora_a: torch.Tensor,
        up_lora_b: torch.Tensor,
        down_lora_a: torch.Tensor,
        down_lora_b: torch.Tensor,
    ) -> None:
        """Take the six LoRA tensors (all bf16 or all fp32) as the parameters, and their values as of now."""
        given = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        for name, tensor in argument_checks.check_lora(self.spec, dict(zip(LORA_NAMES, given, strict=True))).items():
            setattr(self, name, tensor if tensor.is_contiguous() else tensor.detach().contiguous())
        self._take_over()

    def update_lora_weights(self) -> None:
        """Compute with the parameters' present values from now on, all six alike. Outstanding forwards keep theirs."""
        argument_checks.check_ready(True, bool(self._lora), "update_lora_weights")
        self._take_over()

    def _take_over(self) -> None:
        present = argument_checks.check_lora(self.spec, {name: getattr(self, name) for name in LORA_NAMES})
        self._lora = {name: tensor.detach().clone() for name, tensor in present.items()}

    def forward_sft(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> torch.Tensor:
        """output [T, H] bf16 of hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32."""
        argument_checks.check_ready(bool(self._base), bool(self._lora), "forward_sft")
        argument_checks.check_forward(self.spec, hidden_states, expert_ids, weights)
        argument_checks.check_expert_ids(expert_ids, self.spec.num_experts)
        if save_for_backward:
            argument_checks.check_room(len(self._saved), self.spec.max_cache_depth)
        with memory_error():
            return self._forward(hidden_states.detach(), expert_ids, weights.detach(), save_for_backward)

    def _forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, save: bool
    ) -> torch.Tensor:
        trained = self.spec.lora_backward
        saved = Saved(len(hidden_states), expert_ids.shape, self._lora[LORA_NAMES[0]].dtype)
        output = torch.zeros(hidden_states.shape, dtype=torch.bfloat16, device="cpu")
        weights = weights.to(torch.bfloat16)
        by_expert = [self._lora[name].unbind(0) for name in LORA_NAMES]
        for expert, rows, slots in routed(expert_ids):
            base = (tensor[self._slot_of[expert]] for tensor in self._base)
            lora = [tensors[expert].requires_grad_(save and trained) for tensors in by_expert]
            x = hidden_states[rows].requires_grad_(save)
            w = weights[rows, slots].requires_grad_(save)
            with torch.set_grad_enabled(save):
                masks = self._masks(len(rows)) if save else (None, None, None)
                s = self.spec.scaling
                y = plain_expert(x, *base, *lora, scaling=s, skip_lora=not trained, masks=masks) * w.unsqueeze(1)
            output.index_add_(0, rows, y.detach())
            if save:
                saved.graphs[expert] = (rows, slots, y, [x, w, *lora])
        if save:
            self._saved.append(saved)
        return output

    def _masks(self, slots: int) -> OfRows:
        """What multiplies the LoRA inputs of gate and up [slots, H] and of down [slots, I]; None without dropout."""
        p, widths = self.spec.lora_dropout, (self.spec.hidden_size, self.spec.moe_intermediate_size)
        if p == 0:
            return None, None, None
        gate, up, down = (
            (torch.rand(slots, width, dtype=torch.float32, device="cpu") >= p) / (1 - p)
            for width in (widths[0], *widths)
        )
        return gate, up, down

    def backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(grad_input [T, H] bf16, six LoRA gradients) of the newest saved forward; grad_weights then holds dw [T, k].

        Where the method leaves LoRA out, its gradients are zero and grad_input has the base's part only.
        """
        argument_checks.check_backward(self.spec, grad_output, self._saved[-1].rows if self._saved else None)
        with memory_error():
            return self._backward(self._saved.pop(), grad_output.detach())

    def _backward(self, saved: Saved, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        grad_input = torch.zeros(grad_output.shape, dtype=torch.bfloat16, device="cpu")
        grad_weights = torch.zeros(saved.slots, dtype=torch.float32, device="cpu")
        grad_loras = {f"grad_{name}": zeros(shape, saved.lora_dtype) for name, shape in self.spec.lora_shapes.items()}
        parts = []
        # the last expert first: its weights are still in the caches after a forward
        for expert, (rows, slots, y, leaves) in reversed(saved.graphs.items()):
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            dx, dw, *d_lora = torch.autograd.grad(y, wanted, grad_output[rows])
            parts.append((rows, dx))
            grad_weights[rows, slots] = dw.float()
            # without LoRA in the backward d_lora is empty, and the gradients stay zero
            for name, gradient in zip(LORA_NAMES, d_lora, strict=False):
                grad_loras[f"grad_{name}"][expert] = gradient
        for rows, dx in reversed(parts):
            grad_input.index_add_(0, rows, dx)
        self.grad_weights = grad_weights
        return grad_input, grad_loras

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Nothing is shared between layers here."""


@contextlib.contextmanager
def memory_error() -> Iterator[None]:
    """MemoryError with how much was needed and how much there is, instead of torch's RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        refused = re.search(r"allocate (\d+) bytes", str(error))
        if refused is None:
            raise
        needed, there = int(refused.group(1)) / 2**30, psutil.virtual_memory().available / 2**30
        raise MemoryError(f"one tensor needs {needed:.1f} GiB and {there:.1f} GiB are available") from error
