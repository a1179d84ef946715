"""Checkpoints in FP8 with a scale for each block, as DeepSeek-V3's: their tensors, dequantised as they are read.

`<name>` is float8_e4m3fn [N, K]; `<name>_scale_inv` is [⌈N / n⌉, ⌈K / k⌉] for blocks of n × k, weight_block_size in the
quantization_config. A weight is the number times the scale of its block. transformers reads such files as well, but
blocks that are cut off at an edge it takes for smaller ones of equal size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ktverify.engines.native.base_weights import INDEX, read_index

METHOD = "fp8"
_SCALE = "_scale_inv"


def blocks_of(config: Any) -> tuple[int, int] | None:
    """Rows and columns of a block where a model's configuration says that its checkpoint is in FP8, else None.

    ValueError for FP8 of another form."""
    about = getattr(config, "quantization_config", None)
    about = about if isinstance(about, dict) or about is None else about.to_dict()
    if not about or str(about.get("quant_method")) != METHOD:
        return None
    size = about.get("weight_block_size")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"its FP8 has weight_block_size {size!r}; it takes the rows and columns of a block")
    return size[0], size[1]


def tensors_in(folder: Path, blocks: tuple[int, int]) -> dict[str, Any]:
    """The tensors of the safetensors files in `folder`, each read by [...]; those in FP8 as float32.

    ValueError, before a weight is read, for an FP8 weight without scales or with scales of another shape."""
    slices = dict(_slices(folder))
    found: dict[str, Any] = {}
    for name, weight in slices.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in slices:
            continue
        found[name] = weight
        kind = weight.get_dtype()
        if kind.startswith("F8"):
            found[name] = _Dequantised(weight, _scale_of(slices, name, blocks), blocks)
    return found


def _slices(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, slice) of every tensor. An index says which file counts."""
    index = folder / INDEX
    listed = read_index(index) if index.is_file() else None
    files = {folder / file for file in listed.values()} if listed is not None else set(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors")
    for file in sorted(files):
        try:
            opened: Any = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
        for name in opened.keys():  # noqa: SIM118  # no mapping
            if listed is None or listed.get(name) == file.name:
                yield name, opened.get_slice(name)


def _scale_of(slices: dict[str, Any], name: str, blocks: tuple[int, int]) -> Any:
    weight, scale = slices[name], slices.get(name + _SCALE)
    if weight.get_dtype() != "F8_E4M3":
        raise ValueError(f"{name} is {weight.get_dtype()}: FP8 weights are read as F8_E4M3")
    if scale is None:
        raise ValueError(f"{name} is in FP8 and has no {name}{_SCALE}")
    *before, rows, columns = weight.get_shape()
    wanted = [*before, -(-rows // blocks[0]), -(-columns // blocks[1])]
    if scale.get_dtype() not in ("F32", "BF16", "F16") or scale.get_shape() != wanted:
        raise ValueError(
            f"{name}{_SCALE} is {scale.get_dtype()} {scale.get_shape()}; blocks of {blocks[0]} x {blocks[1]} in "
            f"{weight.get_shape()} have floating-point scales {wanted}"
        )
    return scale


@dataclass(frozen=True)
class _Dequantised:
    """A weight that transformers reads like a slice of a file."""

    weight: Any
    scale: Any
    blocks: tuple[int, int]

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        shape: list[int] = self.weight.get_shape()
        return shape

    def __getitem__(self, part: Any) -> torch.Tensor:
        found, scale = self.weight[...].float(), self.scale[...].float()
        for dim, size in zip((-2, -1), self.blocks, strict=True):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, found.shape[dim])
        whole: torch.Tensor = found.mul_(scale)
        return whole[part]
