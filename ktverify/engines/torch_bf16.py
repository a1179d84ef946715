"""torch_bf16: the whole contract in plain torch, a bf16 loop over experts. Slow, readable, and right.

Comes in: KTMoEWrapper's keyword arguments. Goes out: a layer with its methods. It is the engine to compare others with,
to try the suites on a machine without AMX, and to build wrong engines upon. Its arithmetic is reference.plain_expert;
here stand the calls, their order and what they refuse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from ktverify.names import LORA_NAMES, lora_shapes
from ktverify.reference import plain_expert, routed, zeros

METHODS = ("AMXBF16_SFT", "AMXBF16_SFT_SkipLoRA")
MODES = ("sft",)
_BASE_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass
class _Saved:
    """One outstanding forward: expert_ids, weights and, per expert, the rows, the slots and what autograd needs."""

    rows: int
    expert_ids: torch.Tensor
    graphs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict)


class TorchBf16:
    """A layer of E experts, bf16 base weights [E, I, H], [E, I, H], [E, H, I] and LoRA of rank r; see CONTRACT.md.

    ValueError, TypeError and RuntimeError as section 4 lists them, before anything is computed or changed.
    threadpool_count and cpuinfer_threads are checked but change nothing: torch has its own threads. isa is ignored.
    """

    def __init__(
        self,
        layer_idx: int = 0,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        hidden_size: int = 0,
        moe_intermediate_size: int = 0,
        num_gpu_experts: int = 0,
        cpuinfer_threads: int = 1,
        threadpool_count: int = 1,
        weight_path: str = "",
        chunked_prefill_size: int = 25600,
        method: str = METHODS[0],
        mode: str = MODES[0],
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        isa: str | None = None,
    ) -> None:
        for name, value, allowed in (("mode", mode, MODES), ("method", method, METHODS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, it takes one of {', '.join(allowed)}")
        for name, size in (
            ("num_experts", num_experts),
            ("num_experts_per_tok", num_experts_per_tok),
            ("hidden_size", hidden_size),
            ("moe_intermediate_size", moe_intermediate_size),
            ("cpuinfer_threads", cpuinfer_threads),
            ("threadpool_count", threadpool_count),
            ("chunked_prefill_size", chunked_prefill_size),
            ("lora_rank", lora_rank),
            ("max_cache_depth", max_cache_depth),
        ):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, it takes a whole number of 1 or more")
        if num_experts_per_tok > num_experts:
            raise ValueError(f"num_experts_per_tok is {num_experts_per_tok}, it takes 1 to num_experts = {num_experts}")
        if not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {lora_alpha!r}, it takes a positive finite number")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout!r}, it takes a number from 0 to below 1")
        if num_gpu_experts != 0 or weight_path:
            raise ValueError("num_gpu_experts takes 0 and weight_path takes '': this engine has neither GPU nor files")
        if moe_intermediate_size % threadpool_count:
            works = [n for n in range(1, threadpool_count + 1) if moe_intermediate_size % n == 0]
            raise RuntimeError(
                f"For TP, intermediate_size ({moe_intermediate_size}) must be a multiple of threadpool_count "
                f"({threadpool_count}); degrees that would work: {', '.join(map(str, works))}"
            )
        self.isa = "torch"
        self.layer_idx = layer_idx
        self.num_experts = num_experts
        self.top_k = num_experts_per_tok
        self.hidden = hidden_size
        self.intermediate = moe_intermediate_size
        self.max_rows = chunked_prefill_size
        self.rank = lora_rank
        self.scaling = lora_alpha / lora_rank
        self.skip_lora = method.endswith("_SkipLoRA")
        self.max_cache_depth = max_cache_depth
        self.grad_weights: torch.Tensor | None = None
        self._base: dict[str, torch.Tensor] = {}
        self._slot_of: list[int] = []  # logical expert -> physical slot
        self._lora: dict[str, torch.Tensor] = {}  # the values of the last update
        self._saved: list[_Saved] = []

    # ------------------------------------------------------------ loading

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_map: torch.Tensor | None = None,
    ) -> None:
        """Take gate_proj, up_proj [E, I, H] and down_proj [E, H, I] bf16; slot p holds logical expert physical_map[p].

        The tensors are kept, not copied, unless they are not contiguous.
        """
        e, h, i = self.num_experts, self.hidden, self.intermediate
        found = {}
        for name, tensor, shape in zip(
            _BASE_NAMES, (gate_proj, up_proj, down_proj), ((e, i, h), (e, i, h), (e, h, i)), strict=True
        ):
            _check_tensor(name, tensor, shape, (torch.bfloat16,))
            found[name] = tensor.detach()
        copied = sum(2 * tensor.numel() for tensor in found.values() if not tensor.is_contiguous())
        there = psutil.virtual_memory().available
        if copied > there:
            raise MemoryError(
                f"copying the base weights takes {copied / 2**30:.1f} GiB, there is {there / 2**30:.1f} GiB"
            )
        order = list(range(e))
        if physical_map is not None:
            _check_tensor("physical_map", physical_map, (e,), (torch.int64,))
            order = physical_map.tolist()
            if sorted(order) != list(range(e)):
                raise ValueError(f"physical_map is no permutation of 0..{e - 1}: {order[:16]}")
        self._base = {name: tensor.contiguous() for name, tensor in found.items()}
        self._slot_of = [0] * e
        for slot, expert in enumerate(order):
            self._slot_of[expert] = slot

    def init_lora_weights(
        self,
        gate_lora_a: torch.Tensor,
        gate_lora_b: torch.Tensor,
        up_lora_a: torch.Tensor,
        up_lora_b: torch.Tensor,
        down_lora_a: torch.Tensor,
        down_lora_b: torch.Tensor,
    ) -> None:
        """Take the six LoRA tensors (bf16 or fp32, all of one dtype) as the parameters, and their values as of now."""
        given = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        self._check_lora(dict(zip(LORA_NAMES, given, strict=True)))
        for name, tensor in zip(LORA_NAMES, given, strict=True):
            setattr(self, name, tensor if tensor.is_contiguous() else tensor.contiguous())
        self.update_lora_weights()

    def update_lora_weights(self) -> None:
        """Compute with the parameters' present values from now on, all six alike. Outstanding forwards keep theirs."""
        if not all(hasattr(self, name) for name in LORA_NAMES):
            raise RuntimeError("update_lora_weights before init_lora_weights: there are no parameters yet")
        present = {name: getattr(self, name) for name in LORA_NAMES}
        self._check_lora(present)
        self._lora = {name: tensor.detach().clone().contiguous() for name, tensor in present.items()}

    # ------------------------------------------------------------ computing

    def forward_sft(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> torch.Tensor:
        """output [T, H] bf16 of hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32."""
        self._check_forward(hidden_states, expert_ids, weights, save_for_backward)
        saved = _Saved(hidden_states.shape[0], expert_ids.clone())
        output = torch.zeros_like(hidden_states)
        for expert, rows, slots in routed(expert_ids):
            slot = self._slot_of[expert]
            lora = [self._lora[name][expert].detach().requires_grad_(not self.skip_lora) for name in LORA_NAMES]
            x = hidden_states.detach()[rows].requires_grad_()
            w = weights.detach()[rows, slots].to(torch.bfloat16).requires_grad_()
            with torch.set_grad_enabled(save_for_backward):
                base = [self._base[name][slot] for name in _BASE_NAMES]
                y = self.expert(x, *base, *lora, scaling=self.scaling, skip_lora=self.skip_lora)
                y = y * w.unsqueeze(1)
            output.index_add_(0, rows, y.detach())
            if save_for_backward:
                saved.graphs[expert] = (rows, slots, y, [x, w, *lora])
        if save_for_backward:
            self._saved.append(saved)
        return output

    def backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(grad_input [T, H] bf16, six LoRA gradients) of the newest outstanding forward; sets grad_weights [T, k]."""
        if not self._saved:
            raise RuntimeError("backward without a saved forward: call forward_sft with save_for_backward=True first")
        saved = self._saved[-1]
        _check_tensor("grad_output", grad_output, (saved.rows, self.hidden), (torch.bfloat16,))
        self._saved.pop()
        grad_input = torch.zeros_like(grad_output, memory_format=torch.contiguous_format)
        grad_weights = torch.zeros(saved.expert_ids.shape)
        grad_loras = {f"grad_{name}": zeros(self._lora[name].shape, self._lora[name].dtype) for name in LORA_NAMES}
        for expert, (rows, slots, y, leaves) in saved.graphs.items():
            wanted = leaves[:2] if self.skip_lora else leaves
            dx, dw, *d_lora = torch.autograd.grad(y, wanted, grad_output.detach()[rows])
            grad_input.index_add_(0, rows, dx)
            grad_weights[rows, slots] = dw.float()
            for name, gradient in zip(LORA_NAMES, d_lora, strict=False):
                grad_loras[f"grad_{name}"][expert] = gradient
        self.grad_weights = grad_weights
        return grad_input, grad_loras

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Nothing is shared between layers here."""

    # what one expert computes; a wrong engine for the suites' own tests replaces it
    expert = staticmethod(plain_expert)

    # ------------------------------------------------------------ refusing

    def _check_lora(self, tensors: dict[str, Any]) -> None:
        shapes = lora_shapes(self.num_experts, self.hidden, self.intermediate, self.rank)
        for name, tensor in tensors.items():
            _check_tensor(name, tensor, shapes[name], (torch.bfloat16, torch.float32))
        kinds = {tensor.dtype for tensor in tensors.values()}
        if len(kinds) > 1:
            raise TypeError(f"the six LoRA tensors have dtypes {', '.join(map(str, kinds))}, they take one")

    def _check_forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, save: bool
    ) -> None:
        if not self._base:
            raise RuntimeError("forward_sft before load_weights_from_tensors: there are no base weights yet")
        if not self._lora:
            raise RuntimeError("forward_sft before init_lora_weights: there are no LoRA weights yet")
        if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 2:
            raise ValueError(f"hidden_states is {_shape(hidden_states)}, it takes [T, {self.hidden}]")
        rows = hidden_states.shape[0]
        _check_tensor("hidden_states", hidden_states, (rows, self.hidden), (torch.bfloat16,))
        _check_tensor("expert_ids", expert_ids, (rows, self.top_k), (torch.int64,))
        _check_tensor("weights", weights, (rows, self.top_k), (torch.float32,))
        if rows > self.max_rows:
            raise ValueError(f"hidden_states has {rows} rows, chunked_prefill_size allows {self.max_rows}")
        wrong = ((expert_ids < -1) | (expert_ids >= self.num_experts)).nonzero()
        if len(wrong):
            row, slot = wrong[0].tolist()
            raise ValueError(
                f"expert_ids[{row}, {slot}] is {int(expert_ids[row, slot])}, it takes -1 to {self.num_experts - 1}"
            )
        if save and len(self._saved) >= self.max_cache_depth:
            raise RuntimeError(
                f"{len(self._saved)} forwards are outstanding and max_cache_depth is {self.max_cache_depth}: "
                "call backward first, or raise max_cache_depth"
            )


def _check_tensor(name: str, tensor: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """TypeError or ValueError unless `tensor` is a CPU tensor of that shape and one of those dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, it takes a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}, it takes {' or '.join(map(str, dtypes))}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, it takes a tensor on the cpu")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {_shape(tensor)}, it takes {list(shape)}")


def _shape(tensor: Any) -> str:
    return str(list(tensor.shape)) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
