"""Weight formats in safetensors files: the names, dtypes and shapes of the tensors of one matrix, and their values.

The one place that knows them. The engine's reader (native/checkpoint.py) leaves an expert's codes in the mapped file;
that of whole models (training/quantised.py) dequantises. Formats are those of docs/contract.md. Names are those of
published checkpoints: DeepSeek-V3 and Qwen3 (fp8), compressed-tensors (int4 is its pack-quantized of 4 bits; int8 its
pack-quantized of 8 bits, or int-quantized, with a scale for each row), and MXFP4 with a scale for 32 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktverify.engines.quantise import FP8_BLOCK, PER_ELEMENT
from ktverify.engines.quantised import MXFP4_GROUP, CodedMatrix

if TYPE_CHECKING:
    import torch

WEIGHT = "weight"  # what the name of a matrix ends with in a model
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Layout:
    """How a format is stored: what stands for "weight" in the names of its tensors, and their dtypes as safetensors
    names them. "" where the format has no such tensor."""

    codes: str
    code_dtypes: tuple[str, ...]
    scales: str = ""
    scale_dtypes: tuple[str, ...] = ()
    zero_points: str = ""
    shape: str = ""


LAYOUTS = {
    "bf16": Layout("weight", ("BF16",)),
    "fp8": Layout("weight", ("F8_E4M3",), "weight_scale_inv", _FLOATS),
    "int8": Layout("weight", ("I8",), "weight_scale", _FLOATS),
    "int4": Layout("weight_packed", ("I32",), "weight_scale", _FLOATS, "weight_zero_point", "weight_shape"),
    "mxfp4": Layout("weight", ("U8",), "scale", ("U8", "F8_E8M0")),
}
# int8 as bytes q + 128, four in a number, the first in its lowest bits
PACKED_INT8 = Layout("weight_packed", ("I32",), "weight_scale", _FLOATS, shape="weight_shape")
# what a matrix here does not have, by what stands for "weight": a permutation of columns; zero points beside int4
_ORDER, _ZEROS = "weight_g_idx", "weight_zero_point"

# (file, slice) of a tensor by its name, None where there is none; a slice has get_dtype(), get_shape() and [...]
Lookup = Callable[[str], "tuple[Path, Any] | None"]


def name_of(stem: str, word: str) -> str:
    """The name of a tensor of the matrix that a model calls `stem`: "a.weight" or, where stacked, "a"."""
    if stem.endswith(f".{WEIGHT}"):
        return stem.removesuffix(WEIGHT) + word
    return stem + word.removeprefix(WEIGHT)


def matrix_of(lookup: Lookup, name: str) -> tuple[str, str] | None:
    """(stem, format) where the tensor of this name has a matrix's codes, else None.

    ValueError where weight_packed does not say whether it has codes of 4 or 8 bits."""
    found = lookup(name)
    dtype = found[1].get_dtype() if found else ""
    if dtype.startswith("F8_E") and dtype != "F8_E8M0":
        return name, "fp8"
    if found and name.endswith(f".{PACKED_INT8.codes}"):
        stem = name.removesuffix(PACKED_INT8.codes) + WEIGHT
        return stem, "int8" if dtype == "I32" and _holds_bytes(lookup, stem, found) else "int4"
    if name.endswith(f".{WEIGHT}") and dtype in ("I8", "U8"):
        return name, "int8" if dtype == "I8" else "mxfp4"
    return None


def _holds_bytes(lookup: Lookup, stem: str, packed: tuple[Path, Any]) -> bool:
    """Whether four codes are in a number of weight_packed [..., N, n], by weight_shape, and not eight. ValueError for
    neither."""
    name, shape = name_of(stem, PACKED_INT8.shape), packed[1].get_shape()
    where = f"{packed[0]}: {name_of(stem, PACKED_INT8.codes)}"
    if (found := lookup(name)) is None:
        raise ValueError(f"{where} has no {name}, which says whether its codes have 4 or 8 bits")
    rows, columns = _true_shape(f"{found[0]}: {name}", found[1])
    if shape[-2:] == [rows, -(-columns // 8)]:
        return False
    if shape[-2:] != [rows, -(-columns // 4)]:
        raise ValueError(f"{where} is {shape}; {name} says {[rows, columns]}, and codes have 4 or 8 bits")
    return True


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [..., N, K] of codes in files. block: rows and columns that share a scale; columns of 0: a whole row.

    The slices of its tensors; `where` names each in errors: codes, scales, zero points. tensors: all that it has."""

    format: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    codes: Any
    scales: Any
    zero_points: Any
    where: tuple[str, str, str]
    tensors: tuple[str, ...]

    def values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes as they are in the file; scales [..., groups], of int8 [N]; zero points int8, of the scales' shape."""
        import torch

        codes: torch.Tensor = self.codes[...]
        scales: torch.Tensor = self.scales[...]
        if self.format == "int8":
            return codes, scales.reshape(self.shape[:-1]), None
        if self.zero_points is None:
            return codes, scales, None
        zeros: torch.Tensor = self.zero_points[...]
        if zeros.dtype == torch.int32:  # eight rows in a number, the first in the lowest bits, and 8 more
            parts = [(zeros >> shift & 15) - 8 for shift in range(0, 32, 4)]
            zeros = torch.stack(parts, 1).flatten(0, 1)[: self.shape[-2]].to(torch.int8)
        return codes, scales, zeros

    def dequantised(self) -> torch.Tensor:
        """fp32 [..., N, K]: the codes times their scales."""
        return CodedMatrix(self.format, self.block, *self.values()).products()[..., : self.shape[-1]]


def require_one_form(lookup: Lookup, stem: str) -> None:
    """ValueError for a matrix that files have both as numbers or codes in `weight` and as codes in `weight_packed`."""
    packed = name_of(stem, PACKED_INT8.codes)
    if (plain := lookup(stem)) and (coded := lookup(packed)):
        raise ValueError(f"{plain[0]}: {stem} is there, and so is {coded[0]}: {packed}; remove one")


def stored_matrix(
    lookup: Lookup,
    stem: str,
    format: str,
    where_none: str,
    *,
    fp8_block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK),
) -> StoredMatrix:
    """The matrix `stem` in this format; only headers are read. where_none: what has no such tensor, in an error.

    ValueError, or TypeError for a dtype, in one line that names file and tensor: a missing tensor, another dtype or
    shape, groups that do not divide a row, columns in another order."""
    require_one_form(lookup, stem)
    layout = LAYOUTS[format]
    if format == "int8" and lookup(name_of(stem, layout.codes)) is None:
        layout = PACKED_INT8
    names = {part: name_of(stem, word) for part, word in vars(layout).items() if isinstance(word, str) and word}
    at = {part: lookup(name) for part, name in names.items()}

    def where(part: str) -> str:
        found = at[part]
        return f"{found[0]}: {names[part]}" if found else names[part]

    codes = at["codes"]
    if codes is None:
        plain = lookup(stem)
        also = f"; {plain[0]}: {stem} is {plain[1].get_dtype()}" if plain else ""
        raise ValueError(f"{where_none} has no {names['codes']}, of {format}{also}")
    _require_dtype(where("codes"), codes[1], layout.code_dtypes, format)
    if at["scales"] is None:
        raise ValueError(f"{where('codes')} is {format} and has no {names['scales']}")
    if lookup(name_of(stem, _ORDER)):
        raise ValueError(f"{where('codes')} has {name_of(stem, _ORDER)}: columns in another order are not read")
    if not layout.zero_points and lookup(name_of(stem, _ZEROS)):
        raise ValueError(f"{where('codes')} has {name_of(stem, _ZEROS)}: zero points of {format} are not read")
    scales = at["scales"][1]
    _require_dtype(where("scales"), scales, layout.scale_dtypes, format)
    *before, rows, columns = _matrix_shape(where("codes"), codes[1].get_shape())
    width, per_element = columns, 4 if layout is PACKED_INT8 else PER_ELEMENT[format]
    columns *= per_element
    given = scales.get_shape()
    if layout.shape:
        if (stored := at["shape"]) is None:
            raise ValueError(f"{where('codes')} has no {names['shape']}")
        shape = _true_shape(where("shape"), stored[1])
        if shape[0] != rows or -(-shape[1] // per_element) != width:
            raise ValueError(f"{where('codes')} is {codes[1].get_shape()}; {names['shape']} says {shape}")
        columns = shape[1]
    if format == "fp8":
        block = fp8_block
        wanted = [[*before, -(-rows // block[0]), -(-columns // block[1])]]
    elif format == "int8":
        block = 1, 0
        wanted = [[*before, rows], [*before, rows, 1]]
    else:
        groups = given[-1] if given else 0
        block = 1, MXFP4_GROUP if format == "mxfp4" else columns // groups if groups else 0
        if block[1] == 0 or columns % block[1] or (format == "int4" and columns % groups):
            raise ValueError(
                f"{where('scales')} is {scales.get_dtype()} {given}: groups do not divide a row of {columns} weights"
            )
        wanted = [[*before, rows, columns // block[1]]]
    if given not in wanted:
        what = f"blocks of {block[0]} x {block[1]} in" if format == "fp8" else f"{format} of"
        what += f" {[*before, rows, columns]} has scales {wanted[0]}"
        raise ValueError(f"{where('scales')} is {scales.get_dtype()} {given}; {what}")
    zeros = at.get("zero_points")
    if zeros is not None:
        dtype, shape = zeros[1].get_dtype(), zeros[1].get_shape()
        takes = {"I32": [-(-rows // 8), wanted[0][-1]], "I8": wanted[0]}
        if takes.get(dtype) != shape:
            raise ValueError(
                f"{where('zero_points')} is {dtype} {shape}; it takes I32 {takes['I32']}, eight rows in a number, "
                f"or I8 {takes['I8']}"
            )
    return StoredMatrix(
        format,
        (*before, rows, columns),
        block,
        codes[1],
        scales,
        None if zeros is None else zeros[1],
        (where("codes"), where("scales"), where("zero_points") if "zero_points" in at else ""),
        tuple(names.values()),
    )


def _require_dtype(where: str, tensor: Any, takes: tuple[str, ...], format: str) -> None:
    if tensor.get_dtype() not in takes:
        raise TypeError(f"{where} is {tensor.get_dtype()} {tensor.get_shape()}; {format} takes {' or '.join(takes)}")


def _matrix_shape(where: str, shape: list[int]) -> list[int]:
    if len(shape) < 2:
        raise ValueError(f"{where} has shape {shape}; it takes a matrix")
    return shape


def _true_shape(where: str, found: Any) -> list[int]:
    if found.get_dtype() not in ("I32", "I64") or found.get_shape() != [2]:
        raise ValueError(f"{where} is {found.get_dtype()} {found.get_shape()}; it takes I32 or I64 [2]")
    return [int(size) for size in found[...]]
