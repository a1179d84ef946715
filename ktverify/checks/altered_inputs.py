"""Inputs with some tensors exchanged, elsewhere in memory, or under another case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ktverify.spec.inputs import Inputs
from ktverify.spec.names import BASE_NAMES

TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")


def changed(inputs: Inputs, **tensors: Tensor) -> Inputs:
    """`inputs` with some tensors exchanged, LoRA tensors by their names; everything else is shared."""
    result = copy.copy(inputs)
    result.lora = {name: tensors.pop(name, tensor) for name, tensor in inputs.lora.items()}
    for name, tensor in tensors.items():
        setattr(result, name, tensor)
    return result


def everywhere(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """`inputs` with every tensor that a layer takes put through `change`."""
    tensors = {name: change(getattr(inputs, name)) for name in (*TOKENS, *BASE_NAMES, "physical_map")}
    lora = {name: change(tensor) for name, tensor in inputs.lora.items()}
    return changed(inputs, **tensors, **lora)


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A copy whose first byte lies `offset` bytes after a multiple of 64."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.empty(size + 128, dtype=torch.uint8).numpy()
    start = -buffer.ctypes.data % 64 + offset
    copied = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copied.copy_(tensor)


def with_case(inputs: Inputs, **sizes: object) -> Inputs:
    """`inputs` under another case; `sizes` are fields of Case."""
    return replace(inputs, case=replace(inputs.case, **sizes))  # type: ignore[arg-type]


def rows_of(inputs: Inputs, rows: slice | Tensor) -> Inputs:
    """`inputs` with some of its tokens, in that order."""
    part = changed(inputs, **{name: getattr(inputs, name)[rows] for name in TOKENS})
    return with_case(part, qlen=len(part.hidden_states))
