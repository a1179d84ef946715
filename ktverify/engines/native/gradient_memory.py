"""The memory of LoRA gradients: one block, and that of freed gradients where it is used again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ktverify import _native


def gradient_tensors(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, *, written: int
) -> tuple[list[torch.Tensor], bool]:
    """Tensors of these shapes in one block of memory, and whether they are zero.

    One block, because huge pages need large blocks. written: the most experts that will write a gradient. If they could
    touch every huge page of the block anyway, reuse a freed gradient block when one exists: clearing the idle experts'
    part is faster than the system's fresh pages. Otherwise use those, because most are never touched.
    """
    sizes = [math.prod(shape) for shape in shapes]
    count = sum(sizes) * dtype.itemsize
    reuse = written * len(shapes) * _native.HUGE_PAGE >= count
    memory, zero = _native.gradient_memory(count, reuse)
    parts = torch.split(torch.from_numpy(memory).view(dtype), sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)], zero
