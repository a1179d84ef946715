"""Codes of bf16 weights, by the lines of docs/contract.md, "Quantised base weights"."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FP8_BLOCK = 128
INT4_GROUPS = (32, 128)

MADE: Mapping[str, int] = {"int8": 0, "int4": INT4_GROUPS[0], "fp8": FP8_BLOCK}
"""The formats that are made of bf16 weights, and the columns that share a scale; 0 for a whole row."""

# codes in one element of their tensor
PER_ELEMENT: Mapping[str, int] = {"fp8": 1, "int8": 1, "int4": 8, "mxfp4": 2}
_DTYPES = {
    "int8": (torch.int8, torch.float32),
    "int4": (torch.int32, torch.bfloat16),
    "fp8": (torch.float8_e4m3fn, torch.float32),
}

# Rows at a time, a multiple of a block's: a matrix is never there as fp32 as a whole.
_ROWS = FP8_BLOCK


def scale_shape(format: str, group: int, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the scales of a matrix [rows, columns] of which `group` columns share one; 0 for a whole row."""
    if not group:
        return (rows,)
    return -(-rows // group) if format == "fp8" else rows, -(-columns // group)


def empty_codes(format: str, group: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) without values for matrices [..., N, K], as load_weights_from_tensors takes them."""
    *before, rows, columns = shape
    sizes = (rows, columns // PER_ELEMENT[format]), scale_shape(format, group, rows, columns)
    codes, scales = (
        torch.empty((*before, *size), dtype=dtype, device="cpu")
        for size, dtype in zip(sizes, _DTYPES[format], strict=True)
    )
    return codes, scales


def make_codes(weight: torch.Tensor, format: str, group: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Write the codes and scales of a bf16 matrix [N, K] into those that empty_codes gave.

    format, group: an item of MADE, or int4 with another of INT4_GROUPS, which divides K. A NaN or Inf gives a scale
    that is not finite.
    """
    rows_of_a_scale = FP8_BLOCK if format == "fp8" else 1
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        w = weight[rows].to(torch.float32, copy=True)
        made = _fp8(w) if format == "fp8" else _int8(w) if format == "int8" else _int4(w, group)
        codes[rows] = made[0]
        scales[first // rows_of_a_scale : (first + _ROWS) // rows_of_a_scale] = made[1]


def codes_of(weight: torch.Tensor, format: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of a bf16 matrix [N, K]; see make_codes."""
    codes, scales = empty_codes(format, group, *weight.shape)
    make_codes(weight, format, group, codes, scales)
    return codes, scales


def _int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _not_zero(w.abs().amax(1, keepdim=True) / 127)
    return w.div_(scale).round_().clamp_(-127, 127).to(torch.int8), scale[:, 0]


def _int4(w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    w = w.view(len(w), -1, group)
    scale = _not_zero((w.abs().amax(2, keepdim=True) / 7).to(torch.bfloat16))
    code = (w.div_(scale.float()).round_().clamp_(-8, 7) + 8).to(torch.uint8).flatten(1)
    return (code[:, 0::2] | code[:, 1::2] << 4).view(torch.int32), scale[..., 0]


def _fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, columns), n, most = w.shape, FP8_BLOCK, torch.finfo(torch.float8_e4m3fn).max
    padded = torch.nn.functional.pad(w, (0, -columns % n, 0, -rows % n))
    blocks = padded.view(-(-rows // n), n, -1, n)
    scale = _not_zero(blocks.abs().amax((1, 3), keepdim=True) / most)
    blocks.div_(scale).clamp_(-most, most)  # a larger number would become NaN
    return padded[:rows, :columns].to(torch.float8_e4m3fn), scale[:, 0, :, 0]


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    return scale.where(scale != 0, 1)
