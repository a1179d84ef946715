"""Inputs of a case: the same bits on every machine.

Every element is a function of (generator version, case name, seed, tensor name, expert, index): see generator.py for
the hashes and data_kinds.py for the values.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ktverify.spec.cases import Case, broken_token
from ktverify.spec.data_kinds import Array, Gaussian, Integer
from ktverify.spec.generator import case_key, hashes
from ktverify.spec.names import BASE_NAMES, lora_shapes
from ktverify.system import limits
from ktverify.system.limits import processors


@dataclass
class Inputs:
    """The input tensors of one case. Sizes as in Case; base weights are in logical order.

    hidden_states, grad_output [T, H] bf16; expert_ids [T, k] int64; weights [T, k] fp32; gate_proj, up_proj [E, I, H]
    and down_proj [E, H, I] bf16: zero for idle experts, never written and so without memory; lora: the six LoRA tensors
    of all experts, by LORA_NAMES; physical_map [E] int64: slot p contains logical expert physical_map[p]; active: the
    logical experts that a token reaches, ascending.
    """

    case: Case
    hidden_states: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    grad_output: torch.Tensor
    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor
    lora: dict[str, torch.Tensor]
    physical_map: torch.Tensor
    active: list[int]

    def slotted(self, name: str) -> torch.Tensor:
        """Base weights `name` [E, ...] bf16 in the order of the slots, as load_weights_from_tensors takes them.

        The tensor itself where the map is the identity, otherwise a copy.
        """
        tensor: torch.Tensor = getattr(self, name)
        identity = torch.arange(self.case.num_experts, device="cpu")
        return tensor if torch.equal(self.physical_map, identity) else tensor[self.physical_map].contiguous()


def make_inputs(case: Case, *, expert_ids: npt.NDArray[np.int64] | None = None) -> Inputs:
    """Inputs of `case`. Takes about 2 ns per element; idle experts take no time.

    expert_ids: int64 [T, k] in place of the case's own routing. MemoryError, before anything is made, where the case
    does not fit into memory.
    """
    limits.require_memory(least_bytes(case), f"the case {case.id}", "take a smaller case")
    expert_ids = route(case) if expert_ids is None else expert_ids
    active = sorted(set(expert_ids[expert_ids >= 0].tolist()))
    draw = Integer(case) if case.exact else Gaussian(case)
    e, h, i = case.num_experts, case.hidden, case.intermediate
    base = {name: _lazy_zeros((e, h, i) if name == "down_proj" else (e, i, h)) for name in BASE_NAMES}
    lora_dtype = np.dtype(np.uint16 if case.lora_dtype == "bfloat16" else np.float32)
    lora = {name: np.zeros(shape, lora_dtype) for name, shape in lora_shapes(e, h, i, case.rank).items()}
    tokens = {name: np.zeros((case.qlen, h), np.uint16) for name in ("hidden_states", "grad_output")}

    tasks: list[Callable[[], None]] = [
        functools.partial(draw.base, name, expert, array[expert]) for expert in active for name, array in base.items()
    ]
    tasks += [functools.partial(draw.lora, name, array) for name, array in lora.items()]
    tasks += [functools.partial(draw.tokens, name, array) for name, array in tokens.items()]
    with ThreadPoolExecutor(max_workers=min(2, processors())) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()

    token = broken_token(case)
    if token is not None:
        column = int(hashes(case_key(case, "broken"), 1)[0] % np.uint64(h))
        tokens["hidden_states"][token, column] = 0x7FC0 if case.data == "nan_row" else 0x7F80
    return Inputs(
        case=case,
        expert_ids=torch.from_numpy(expert_ids),
        weights=torch.from_numpy(draw.weights()),
        **{name: _as_torch(array) for name, array in {**tokens, **base}.items()},
        lora={name: _as_torch(array) for name, array in lora.items()},
        physical_map=torch.from_numpy(physical_map(case)),
        active=active,
    )


def least_bytes(case: Case) -> int:
    """Bytes that the inputs of a case and its oracle take at the least.

    Idle experts take none but for their LoRA; the oracle holds one expert and the results in fp64.
    """
    slots, expert = case.qlen * case.top_k, 3 * case.hidden * case.intermediate
    element = 2 if case.lora_dtype == "bfloat16" else 4
    lora = 3 * case.num_experts * case.rank * (case.hidden + case.intermediate)
    routing = case.qlen * case.num_experts * 16 + case.num_experts * 8
    inputs = min(case.num_experts, slots) * expert * 2 + lora * element + 4 * case.qlen * case.hidden
    oracle = (expert + 2 * case.qlen * case.hidden) * 8 if slots else 0
    return routing + inputs + oracle


def inputs_sha256(inputs: Inputs) -> str:
    """Hexadecimal SHA-256 of all inputs: every tensor whole, but of the base weights only the active experts."""
    digest = hashlib.sha256()
    names = ("hidden_states", "expert_ids", "weights", "grad_output", "physical_map")
    for name, tensor in {**{name: getattr(inputs, name) for name in names}, **inputs.lora}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    for name in BASE_NAMES:
        tensor = getattr(inputs, name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {inputs.active}\n".encode())
        for expert in inputs.active:
            digest.update(_bytes(tensor[expert]))
    return digest.hexdigest()


# ---- routing


def route(case: Case) -> npt.NDArray[np.int64]:
    """expert_ids [T, k] int64."""
    rows, slots, experts = case.qlen, case.top_k, case.num_experts
    key = case_key(case, "routing")
    if case.routing == "zipf":
        ids = _zipf(case, key)
    else:
        # the order of E hashes per token is a random permutation; its first k entries are the experts
        draws = hashes(key, rows * experts).reshape(rows, experts)
        ids = np.argsort(draws, axis=1, kind="stable")[:, :slots].astype(np.int64)
    if case.routing == "one_expert" and rows:
        chosen = ids[0, 0]
        taken = ids == chosen
        # where the chosen expert is in another slot already, that slot gets the expert of slot 0
        ids = np.where(taken, ids[:, :1], ids)
        ids[:, 0] = chosen
    elif case.routing == "duplicate":
        ids[:, 1] = ids[:, 0]
    elif case.routing == "masked":
        keep = ids.copy()
        ids[hashes(case_key(case, "mask"), rows * slots).reshape(rows, slots) % np.uint64(4) == 0] = -1
        ids[:1] = keep[:1]
        if rows > 1:
            ids[-1] = -1
    elif case.routing == "all_masked":
        ids[:] = -1
    return np.ascontiguousarray(ids)


def _zipf(case: Case, key: np.uint64) -> npt.NDArray[np.int64]:
    """expert_ids [T, k]: k draws without replacement, the expert of popularity n with weight 2^32 // n."""
    rows, slots, experts = case.qlen, case.top_k, case.num_experts
    popular = np.argsort(hashes(case_key(case, "popularity"), experts), kind="stable")
    weight = np.array([(1 << 32) // (place + 1) for place in range(experts)], np.uint64)
    draws = hashes(key, rows * slots).reshape(rows, slots)
    ids = np.empty((rows, slots), np.int64)
    for row in range(rows):
        left = weight.copy()
        for slot in range(slots):
            threshold = np.cumsum(left)
            place = int(np.searchsorted(threshold, draws[row, slot] % threshold[-1], side="right"))
            ids[row, slot] = popular[place]
            left[place] = 0
    return ids


def physical_map(case: Case) -> npt.NDArray[np.int64]:
    """[E] int64: the logical expert in each physical slot."""
    if case.physical == "identity":
        return np.arange(case.num_experts, dtype=np.int64)
    return np.argsort(hashes(case_key(case, "physical_map"), case.num_experts), kind="stable").astype(np.int64)


# ---- memory


def _lazy_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Zeros of bf16 width that take memory only where they are written; the kernel reserves none in advance.

    256 experts of DeepSeek-V3 are 22.5 GB, and four tokens reach at most 26 of them. MemoryError without address space.
    """
    count = math.prod(shape)
    # MAP_NORESERVE has a name only in newer Pythons
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    try:
        pages = mmap.mmap(-1, 2 * count, flags=flags)
    except OSError as error:
        raise MemoryError(f"no address space for {2 * count / 1e9:.1f} GB of base weights: {error}") from error
    with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages is only slower
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint16, count).reshape(shape)


def _as_torch(array: Array) -> torch.Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    array: Any = flat.numpy()
    return memoryview(array).cast("B") if array.size else memoryview(b"")
