"""Argument checks of a layer's constructor and of its calls, shared by all engines of the package.

Each error is raised before anything is computed or changed, and names the argument, what it got and what it takes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktverify.spec.names import LORA_NAMES, lora_shapes

if TYPE_CHECKING:
    import torch

FORMATS: Mapping[str, str] = {
    "AMXBF16_SFT": "bf16", "AMXFP8_SFT": "fp8", "AMXINT8_SFT": "int8", "AMXINT4_SFT": "int4", "MXFP4_SFT": "mxfp4",
}  # fmt: skip
"""The format of the base weights, by method."""

WITHOUT_LORA = "_SkipLoRA"
METHODS: Mapping[str, bool] = {f"{name}{end}": not end for name in FORMATS for end in ("", WITHOUT_LORA)}
"""Supported methods, and whether their backward includes LoRA."""

MODES = ("sft",)

# No size of a layer may be larger. Kernels and tables count blocks, rows and bytes of a row in 32-bit integers, with
# small factors (4 bytes an element, 2 r rows, sizes rounded up to blocks). 2^24 is far below 2^31 / 4, and two hundred
# times the widest model. The number of token slots, T k, is such a count: the product has a check of its own.
LARGEST = 1 << 24
MOST_SLOTS = 1 << 30
MOST_NODES = 64
# lora_alpha / lora_rank: the smallest and the largest normal number of fp32, in which the engines multiply by it
SCALINGS = (2.0**-126, (2 - 2.0**-23) * 2.0**127)

# the arguments that are positive integers
_COUNTS = (
    "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size", "cpuinfer_threads",
    "threadpool_count", "chunked_prefill_size", "lora_rank", "max_cache_depth",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The checked arguments of a constructor, by the names and with the defaults of the contract.

    TypeError, ValueError, or RuntimeError for a TP degree that does not divide.
    """

    layer_idx: int = 0
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    num_gpu_experts: int = 0
    gpu_experts_mask: Any = None
    gpu_device: str = "cuda"
    cpuinfer_threads: int
    threadpool_count: int = 1
    weight_path: str = ""
    chunked_prefill_size: int = 25600
    method: str = "AMXBF16_SFT"
    mode: str = "sft"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    max_cache_depth: int = 1
    isa: str | None = None
    numa_nodes: Any = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        top_k = self.num_experts_per_tok
        if self.chunked_prefill_size * top_k > MOST_SLOTS:
            raise ValueError(
                f"chunked_prefill_size is {self.chunked_prefill_size}; with num_experts_per_tok {top_k} it takes "
                f"at most {MOST_SLOTS // top_k}"
            )
        if not 0 <= _integer("layer_idx", self.layer_idx) <= LARGEST:
            raise ValueError(f"layer_idx is {shown(self.layer_idx)}; it takes 0 or more, at most {LARGEST}")
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise ValueError(f"mode is {shown(self.mode)}; supported: {', '.join(MODES)}")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"method is {shown(self.method)}; supported: {', '.join(METHODS)}")
        if not isinstance(self.weight_path, (str, os.PathLike)):
            raise TypeError(f"weight_path is {shown(self.weight_path)}; it takes a path as text")
        if top_k > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {top_k}, more than num_experts ({self.num_experts}); "
                f"it takes 1 to {self.num_experts}"
            )
        self._check_gpu_experts()
        check_alpha(self.lora_alpha, self.lora_rank)
        check_dropout(self.lora_dropout)
        check_tp(self.moe_intermediate_size, self.threadpool_count)
        if self.numa_nodes is not None:
            object.__setattr__(self, "numa_nodes", check_numa_nodes(self.numa_nodes, self.threadpool_count))

    def _check_gpu_experts(self) -> None:
        """Make gpu_experts_mask a tuple of bool where one is given, and num_gpu_experts its count."""
        count = _integer("num_gpu_experts", self.num_gpu_experts)
        if not 0 <= count <= self.num_experts:
            raise ValueError(f"num_gpu_experts is {shown(count)}; it takes 0 to num_experts ({self.num_experts})")
        if not isinstance(self.gpu_device, str):
            raise TypeError(f"gpu_device is {shown(self.gpu_device)}; it takes a device of torch as text, like cuda:0")
        if self.gpu_experts_mask is not None:
            self._take_mask(count)
        if self.num_gpu_experts or self.gpu_device != "cuda":
            check_gpu_device(self.gpu_device, there=bool(self.num_gpu_experts))

    def _take_mask(self, count: int) -> None:
        mask = check_gpu_experts_mask(self.num_experts, self.gpu_experts_mask)
        if count not in (0, sum(mask)):
            raise ValueError(f"num_gpu_experts is {count}, gpu_experts_mask has {sum(mask)} experts: give one of them")
        object.__setattr__(self, "gpu_experts_mask", mask)
        object.__setattr__(self, "num_gpu_experts", sum(mask))

    @property
    def gpu_experts(self) -> tuple[int, ...]:
        """The logical experts that `gpu_device` computes, ascending: those of the mask, or the first of all."""
        if self.gpu_experts_mask is None:
            return tuple(range(self.num_gpu_experts))
        return tuple(expert for expert, there in enumerate(self.gpu_experts_mask) if there)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.lora_rank

    @property
    def lora_backward(self) -> bool:
        return METHODS[self.method]

    @property
    def weight_format(self) -> str:
        """The format of the base weights: bf16, fp8, int8, int4 or mxfp4."""
        return FORMATS[self.method.removesuffix(WITHOUT_LORA)]

    @property
    def bf16_method(self) -> str:
        """The method of the same layer with bf16 base weights."""
        return "AMXBF16_SFT" if self.lora_backward else f"AMXBF16_SFT{WITHOUT_LORA}"

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of one expert's base weights, by name."""
        h, i = self.hidden_size, self.moe_intermediate_size
        return {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}

    @property
    def lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        return lora_shapes(self.num_experts, self.hidden_size, self.moe_intermediate_size, self.lora_rank)


def shown(value: object) -> str:
    """A value as one short line of ASCII, for an error; also of what Python refuses to print."""
    try:
        text = " ".join(ascii(value).split())
    except Exception:  # of an int of more digits than Python writes, or of a class of the caller's
        text = f"an int of {int.bit_length(value)} bits" if isinstance(value, int) else _kind(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: object) -> str:
    return f"a {ascii(type(value).__name__)[1:-1][:60]}"


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {shown(value)}, {_kind(value)}; it takes an int")
    return value


def _number(name: str, value: object) -> float:
    """The value as a float, infinite where it is beyond them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {shown(value)}, {_kind(value)}; it takes an int or a float")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_count(name: str, value: object) -> None:
    """TypeError unless it is an int, ValueError unless it is from 1 to LARGEST."""
    if not 0 < _integer(name, value) <= LARGEST:
        raise ValueError(f"{name} is {shown(value)}; it takes a positive number, at most {LARGEST}")


def check_alpha(alpha: object, rank: int) -> None:
    """TypeError unless it is a number, ValueError unless alpha / rank is a normal number in fp32 above 0."""
    smallest, largest = (rank * scaling for scaling in SCALINGS)
    if not smallest <= _number("lora_alpha", alpha) <= largest:
        raise ValueError(
            f"lora_alpha is {shown(alpha)}; with lora_rank {rank} it takes a positive number, {smallest:.2e} to "
            f"{largest:.2e}, so that lora_alpha / lora_rank is a normal number in fp32"
        )


def check_dropout(dropout: object) -> None:
    """TypeError unless it is a number, ValueError unless it is in [0, 1)."""
    if not 0 <= _number("lora_dropout", dropout) < 1:
        raise ValueError(f"lora_dropout is {shown(dropout)}; it takes a number from 0 up to, not including, 1")


def tp_degrees(intermediate: int, limit: int = 64) -> list[int]:
    """Tensor parallel degrees up to `limit` that divide an intermediate size."""
    return [n for n in range(1, min(intermediate, limit) + 1) if intermediate % n == 0]


def check_tp(intermediate: int, tp: int) -> None:
    """RuntimeError, with the degrees that work, unless the degree `tp` divides the intermediate size."""
    if intermediate % tp:
        works = ", ".join(map(str, tp_degrees(intermediate)))
        raise RuntimeError(
            f"For TP, intermediate_size ({intermediate}) must be a multiple of threadpool_count ({tp}); "
            f"degrees that would work: {works}"
        )


def check_numa_nodes(nodes: Any, parts: int) -> tuple[int, ...]:
    """The NUMA node of each tensor-parallel part, as ints. Whether they exist, the engine checks."""
    takes = f"it takes a list of int, the NUMA node of each of {parts} parts (threadpool_count)"
    if not isinstance(nodes, (list, tuple)) or not all(type(node) is int for node in nodes):
        raise TypeError(f"numa_nodes is {shown(nodes)}; {takes}")
    if len(nodes) != parts or not all(0 <= node < MOST_NODES for node in nodes):
        raise ValueError(f"numa_nodes is {shown(nodes)}; {takes}, from 0 to {MOST_NODES - 1}")
    return tuple(nodes)


def check_tensor(name: str, value: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """`value` itself, if it is a plain CPU tensor (plain_tensors.py) of this shape and one of these dtypes, and results
    will be plain as well; else TypeError or ValueError, RuntimeError. A size of None may be any, and is called T."""
    import torch

    from ktverify.engines.plain_tensors import check_modes, why_not_plain

    sizes = ", ".join("T" if size is None else str(size) for size in shape)
    wants = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} [{sizes}] on the CPU"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {_kind(value)}; it takes a torch.Tensor, {wants}")
    with torch._C.DisableTorchFunctionSubclass():
        if value.layout != torch.strided:
            raise TypeError(f"{name} has layout {value.layout}; it takes a dense tensor, {wants}")
        if value.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; it takes {wants}")
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}; it takes {wants}")
        reason = why_not_plain(value)
        if reason:
            raise TypeError(f"{name} {reason}; it takes a plain tensor, {wants}")
        found = tuple(value.shape)
        if len(found) != len(shape) or any(w not in (None, f) for f, w in zip(found, shape, strict=True)):
            raise ValueError(f"{name} has shape {list(found)}; it takes {wants}")
    check_modes()
    return value


def check_base_weights(spec: LayerSpec, gate_proj: Any, up_proj: Any, down_proj: Any) -> dict[str, torch.Tensor]:
    """gate_proj, up_proj [E, I, H], down_proj [E, H, I], bf16, detached. Any strides."""
    import torch

    from ktverify.engines.plain_tensors import values_of

    given = zip(spec.expert_shapes.items(), (gate_proj, up_proj, down_proj), strict=True)
    experts, dtypes = spec.num_experts, (torch.bfloat16,)
    return {name: values_of(check_tensor(name, tensor, (experts, *shape), dtypes)) for (name, shape), tensor in given}


def check_physical_map(spec: LayerSpec, physical_map: Any) -> list[int]:
    """int64 [E], a permutation: slot p holds logical expert physical_map[p]."""
    import torch

    from ktverify.engines.plain_tensors import values_of

    checked = check_tensor("physical_map", physical_map, (spec.num_experts,), (torch.int64,))
    slots: list[int] = values_of(checked).tolist()
    if sorted(slots) != list(range(spec.num_experts)):
        odd = next((f"{e} at slot {p}" for p, e in enumerate(slots) if not 0 <= e < spec.num_experts), None)
        twice = next((f"{e} twice" for p, e in enumerate(slots) if e in slots[:p]), "")
        raise ValueError(
            f"physical_map has {odd or twice}; it takes a permutation of 0..{spec.num_experts - 1}: "
            "the logical expert that each slot holds"
        )
    return slots


def check_gpu_experts_mask(num_experts: int, mask: Any) -> tuple[bool, ...]:
    """bool [E], a tensor or a list: True for the experts that a torch device computes."""
    import torch

    from ktverify.engines.plain_tensors import values_of

    if isinstance(mask, torch.Tensor):
        mask = values_of(check_tensor("gpu_experts_mask", mask, (num_experts,), (torch.bool,))).tolist()
    if not isinstance(mask, (list, tuple)) or not all(isinstance(there, bool) for there in mask):
        raise TypeError(f"gpu_experts_mask is {shown(mask)}; it takes a tensor or a list, bool [{num_experts}]")
    if len(mask) != num_experts:
        raise ValueError(f"gpu_experts_mask has {len(mask)} values; it takes one for each of {num_experts} experts")
    return tuple(mask)


def check_gpu_device(name: str, *, there: bool = True) -> torch.device:
    """The device of this name: cuda, cuda:N, or cpu, which stands in for a GPU. ValueError for another name;
    RuntimeError for a GPU that is not there, where `there`: it is never replaced."""
    import torch

    takes = "it takes cuda, cuda:N, or cpu, which stands in for a GPU"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):  # a ValueError for text that is no UTF-8
        raise ValueError(f"gpu_device is {shown(name)}; {takes}") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"gpu_device is {shown(name)}; {takes}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if there and (device.index or 0) >= count:
        raise RuntimeError(f"gpu_device is {shown(name)}, and torch sees {count} GPUs here; {takes}")
    return device


def check_lora(spec: LayerSpec, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The six LoRA tensors, all bf16 or all fp32, in the shapes of `spec.lora_shapes`."""
    import torch

    dtypes = (torch.bfloat16, torch.float32)
    checked = {name: check_tensor(name, given[name], shape, dtypes) for name, shape in spec.lora_shapes.items()}
    first = checked[LORA_NAMES[0]].dtype
    for name, tensor in checked.items():
        if tensor.dtype != first:
            raise TypeError(f"{name} has dtype {tensor.dtype}, {LORA_NAMES[0]} has {first}; all six take the same")
    return checked


def check_expert_ids(expert_ids: torch.Tensor, num_experts: int) -> None:
    """ValueError with the first offending position: ids are 0..E-1, or -1 for a slot that is not this layer's."""
    bad = (expert_ids >= num_experts) | (expert_ids < -1)
    if bool(bad.any()):
        t, j = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"expert_ids[{t}, {j}] is {int(expert_ids[t, j])}; it takes 0 to {num_experts - 1}, "
            "or -1 for a slot that is not this layer's"
        )


def check_forward(spec: LayerSpec, hidden_states: Any, expert_ids: Any, weights: Any) -> int:
    """hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32. Returns T."""
    import torch

    tokens = _rows(check_tensor("hidden_states", hidden_states, (None, spec.hidden_size), (torch.bfloat16,)))
    slots = (tokens, spec.num_experts_per_tok)
    check_tensor("expert_ids", expert_ids, slots, (torch.int64,))
    check_tensor("weights", weights, slots, (torch.float32,))
    if tokens > spec.chunked_prefill_size:
        raise ValueError(
            f"hidden_states has {tokens} rows; chunked_prefill_size allows {spec.chunked_prefill_size}: "
            "split the batch or raise it"
        )
    return tokens


def check_backward(spec: LayerSpec, grad_output: Any, saved_rows: int | None) -> None:
    """grad_output [T, H] bf16, with as many rows as the saved forward; `saved_rows` is None where there is none."""
    if saved_rows is None:
        raise RuntimeError("backward without a saved forward: call forward_sft(..., save_for_backward=True) first")
    tokens = check_grad_output(spec, grad_output)
    if tokens != saved_rows:
        raise ValueError(f"grad_output has {tokens} rows; the saved forward had {saved_rows}")


def check_grad_output(spec: LayerSpec, grad_output: Any) -> int:
    """grad_output [T, H] bf16, of any number of rows. Returns T."""
    import torch

    return _rows(check_tensor("grad_output", grad_output, (None, spec.hidden_size), (torch.bfloat16,)))


def _rows(tensor: torch.Tensor) -> int:
    from ktverify.engines.plain_tensors import values_of

    return values_of(tensor).shape[0]


def check_room(outstanding: int, depth: int) -> None:
    """RuntimeError unless there is room for another saved forward beside `outstanding` ones."""
    if outstanding >= depth:
        raise RuntimeError(
            f"forward_sft(save_for_backward=True): {outstanding} forwards already wait for their backward, and "
            f"max_cache_depth is {depth}; call backward first or raise max_cache_depth"
        )


def check_ready(weights: bool, lora: bool, call: str) -> None:
    """RuntimeError that names the missing call."""
    if not weights:
        raise RuntimeError(f"{call} before the base weights are there: call load_weights_from_tensors first")
    if not lora:
        raise RuntimeError(f"{call} before the LoRA weights are there: call init_lora_weights first")
