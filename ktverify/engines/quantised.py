"""Quantised base weights as a caller gives them: their checks, codes made of bf16 weights, and the way back.

docs/contract.md, "Quantised base weights", has the formats and the rule. Matrices are [N, K]: gate_proj and up_proj
[I, H], down_proj [H, I].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ktverify.engines.argument_checks import LayerSpec, check_base_weights, check_tensor, shown, tp_degrees
from ktverify.engines.plain_tensors import values_of
from ktverify.engines.quantise import (
    FP8_BLOCK,
    INT4_GROUPS,
    MADE,
    PER_ELEMENT,
    empty_codes,
    make_codes,
    scale_shape,
)
from ktverify.spec.names import BASE_NAMES

MXFP4_GROUP = 32
# the numbers of e2m1, by code
_E2M1 = [sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
# the native engine's names of scales' dtypes
_SCALES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.uint8: "e8m0", torch.float8_e8m0fnu: "e8m0",
}  # fmt: skip


class WeightFormat(NamedTuple):
    """How base weights are stored; native/include/ktv/weight_format.hpp. offset: int8 is stored as q + 128."""

    format: str = "bf16"
    group: int = 0
    zeros: bool = False
    scale: str = "fp32"
    offset: bool = False


def weight_format_of(
    format: str, group: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> WeightFormat:
    """Of the tensors of one matrix; those of others have the same dtypes."""
    offset = format == "int8" and codes.dtype == torch.int32
    return WeightFormat(format, group, zeros is not None, _SCALES[scales.dtype], offset)


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix [..., N, K] as codes, as load_weights_from_tensors takes one.

    block: rows and columns that share a scale; columns of 0: a whole row. scales, and zero_points where there are any:
    [..., groups], of int8 without the last dimension; scales of any floating-point dtype, of mxfp4 e8m0 or its bytes.
    Files may have int8 as int32 [..., N, K / 4], of bytes q + 128.
    """

    format: str
    block: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None

    def q(self) -> torch.Tensor:
        """fp32 [..., N, K]: the number of each code, less its zero point where there is one."""
        q = self.numbers()
        return q if self.zero_points is None else q - self._of_columns(self.zero_points.float())

    def numbers(self) -> torch.Tensor:
        """fp32 [..., N, K]: the number of each code."""
        if self.codes.dtype == torch.int32 and self.format == "int8":
            return self.codes.view(torch.uint8).float() - 128
        if self.format in ("fp8", "int8"):
            return self.codes.float()
        halves = self.codes.view(torch.uint8)
        code = torch.stack((halves & 15, halves >> 4), dim=-1).flatten(-2)
        # the last element of a row may have codes that no weight has
        code = code[..., : self.scales.shape[-1] * self.block[1]]
        return code.float() - 8 if self.format == "int4" else torch.tensor(_E2M1, device="cpu")[code.long()]

    def scale(self) -> torch.Tensor:
        """fp32: the scale of each weight, [..., N, K]; of int8, where all of a row have one, [..., N, 1]."""
        return self._of_columns(self.row_scales())

    def row_scales(self) -> torch.Tensor:
        """fp32 [..., N, groups]: the scales of each row."""
        scales = (self.scales.view(torch.float8_e8m0fnu) if self.format == "mxfp4" else self.scales).float()
        if self.format == "fp8":
            return scales.repeat_interleave(self.block[0], -2)[..., : self.codes.shape[-2], :]
        return scales if self.block[1] else scales[..., None]

    def products(self) -> torch.Tensor:
        """fp32 [..., N, K]: q times s, with zero points q - z times s."""
        return self.q() * self.scale()

    def _of_columns(self, values: torch.Tensor) -> torch.Tensor:
        if not self.block[1]:
            return values
        columns = self.codes.shape[-1] * PER_ELEMENT[self.format]
        return values.repeat_interleave(self.block[1], -1)[..., :columns]


@dataclass(frozen=True)
class Codes:
    """Base weights [E, N, K] as codes, by BASE_NAMES and by slot; contiguous.

    format: "fp8", "int8", "int4" or "mxfp4". group: columns that share a scale; 0 for a whole row.
    """

    format: str
    group: int
    codes: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]
    zero_points: dict[str, torch.Tensor] | None = None

    def of_slots(self, name: str) -> Iterator[CodedMatrix]:
        """The matrix `name` of each slot."""
        for slot, (codes, scales) in enumerate(zip(self.codes[name], self.scales[name], strict=True)):
            zeros = None if self.zero_points is None else self.zero_points[name][slot]
            yield CodedMatrix(self.format, block_of(self.format, self.group), codes, scales, zeros)


def block_of(format: str, group: int) -> tuple[int, int]:
    """Rows and columns that share a scale, where `group` columns do; columns of 0: a whole row."""
    return group if format == "fp8" else 1, group


def check_codes(spec: LayerSpec, weights: Sequence[Any], scales: Any, zero_points: Any) -> Codes:
    """The Codes of the arguments of load_weights_from_tensors. TypeError or ValueError that names the tensor;
    RuntimeError, with the degrees that work, where a tensor-parallel part would begin inside a group.

    Codes of bf16 weights without scales are made here, one expert's matrix at a time.
    """
    makes = spec.weight_format in MADE and scales is None and zero_points is None
    if makes and all(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16 for tensor in weights):
        base = check_base_weights(spec, *weights)
        found = made_codes(spec, {name: tensor.unbind(0) for name, tensor in base.items()})
    else:
        found = _given(spec, weights, scales, zero_points)
        for name in BASE_NAMES:
            names = (name, f"the scales of {name}", f"the zero points of {name}")
            for slot, of in enumerate(found.of_slots(name)):
                check_values(of.format, names, of.codes, of.scales, of.zero_points, (slot,))
    check_cut(spec, found.group)
    return found


def check_cut(spec: LayerSpec, group: int) -> None:
    """RuntimeError, with the degrees that work, where a tensor-parallel part would begin inside a group."""
    size = spec.moe_intermediate_size
    if spec.weight_format in ("int4", "mxfp4") and size // spec.threadpool_count % group:
        works = [degree for degree in tp_degrees(size) if size // degree % group == 0]
        raise RuntimeError(
            f"For TP, moe_intermediate_size ({size}) divided by threadpool_count ({spec.threadpool_count}) must be a "
            f"multiple of the {group} columns of down_proj that share a scale; degrees that would work: "
            f"{', '.join(map(str, works))}"
        )


def _given(spec: LayerSpec, weights: Sequence[Any], scales: Any, zero_points: Any) -> Codes:
    format, experts = spec.weight_format, spec.num_experts
    given_scales = _three("scales", scales, spec.method)
    given_zeros = None if zero_points is None else _three("zero_points", zero_points, spec.method)
    if given_zeros is not None and format != "int4":
        raise TypeError(f"zero_points were given; method {spec.method} has none: pass None")
    code_dtype, scale_dtypes = {
        "fp8": (torch.float8_e4m3fn, (torch.float32,)),
        "int8": (torch.int8, (torch.float32,)),
        "int4": (torch.int32, (torch.bfloat16, torch.float16, torch.float32)),
        "mxfp4": (torch.uint8, (torch.uint8, torch.float8_e8m0fnu)),
    }[format]
    group = {"fp8": FP8_BLOCK, "int8": 0, "mxfp4": MXFP4_GROUP}.get(format, 0)
    codes, found_scales, zeros = {}, {}, {}
    for position, (name, (rows, columns)) in enumerate(spec.expert_shapes.items()):
        if format in ("int4", "mxfp4") and columns % 32:
            groups = "groups of 32 or 128" if format == "int4" else "groups of 32"
            raise ValueError(f"{name} has rows of {columns} weights; method {spec.method} takes {groups}")
        size = (experts, rows, columns // PER_ELEMENT[format])
        codes[name] = _plain(name, weights[position], size, (code_dtype,))
        if format == "int4":
            group = _int4_group(f"the scales of {name}", given_scales[position], columns, group)
        shape = (experts, *scale_shape(format, group, rows, columns))
        found_scales[name] = _plain(f"the scales of {name}", given_scales[position], shape, scale_dtypes)
        scale_dtypes = (found_scales[name].dtype,)  # all three take the same
        if given_zeros is not None:
            zeros[name] = _plain(f"the zero points of {name}", given_zeros[position], shape, (torch.int8,))
    return Codes(format, group, codes, found_scales, zeros or None)


def _three(what: str, given: Any, method: str) -> tuple[Any, Any, Any]:
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        got = f"{len(given)} of them" if isinstance(given, (tuple, list)) else shown(given)
        raise ValueError(f"{what} is {got}; method {method} takes those of {', '.join(BASE_NAMES)}: a tuple of three")
    missing = [name for name, one in zip(BASE_NAMES, given, strict=True) if one is None]
    if missing:
        raise ValueError(f"{what} has none of {missing[0]}; method {method} takes one tensor for each matrix")
    gate, up, down = given
    return gate, up, down


def _plain(name: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    return values_of(check_tensor(name, value, shape, dtypes)).contiguous()


def _int4_group(name: str, scales: Any, columns: int, before: int) -> int:
    """The columns that share a scale, from the shape of the scales. before: those of an earlier matrix, 0 for none."""
    count = scales.shape[-1] if getattr(scales, "ndim", 0) else 0
    found = next((group for group in INT4_GROUPS if count * group == columns), 0)
    if not found:
        takes = " or ".join(f"{columns // group} ({group})" for group in INT4_GROUPS if columns % group == 0)
        raise ValueError(f"{name} are {count} a row, for {columns} weights; it takes {takes}, by the size of a group")
    if before and found != before:
        raise ValueError(f"{name} are of groups of {found}, those before of {before}; all three take the same")
    return found


def check_values(
    format: str,
    names: tuple[str, str, str],
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    first: tuple[int, ...] = (),
) -> None:
    """ValueError for a code of NaN, a scale that is not finite or below 0, and a zero point that no code has.

    names: of codes, scales and zero points, in errors; first: what stands before a position in them.
    """
    # maxima are quicker than comparisons by far: 0x7F is the largest as signed, 0xFF as unsigned
    if format == "fp8" and (codes.view(torch.int8).amax() == 0x7F or codes.view(torch.uint8).amax() == 0xFF):
        _refuse(names[0], first, (codes.view(torch.uint8) & 0x7F) == 0x7F, "is NaN; it takes finite codes of e4m3")
    if format == "mxfp4":
        _refuse(names[1], first, scales.view(torch.uint8) == 0xFF, "is NaN; it takes 0 to 254, of e8m0")
    else:
        least, most = scales.aminmax()  # NaN where there is one
        if not (least >= 0 and most < float("inf")):
            bad = ~(scales.isfinite() & (scales >= 0))
            _refuse(names[1], first, bad, "is {}; it takes finite numbers of 0 or more", scales)
    if zeros is not None:
        _refuse(names[2], first, (zeros < -8) | (zeros > 7), "is {}; it takes -8 to 7", zeros)


def _refuse(
    what: str, first: tuple[int, ...], bad: torch.Tensor, says: str, values: torch.Tensor | None = None
) -> None:
    """ValueError with the first position where `bad` is true."""
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        value = "" if values is None else float(values[place])
        raise ValueError(f"{what}: [{', '.join(map(str, (*first, *place)))}] {says.format(value)}")


def made_codes(spec: LayerSpec, weights: Mapping[str, Sequence[torch.Tensor]]) -> Codes:
    """The Codes of bf16 matrices [N, K], by BASE_NAMES and slot, made one after the other.

    ValueError for a NaN or Inf, and for int4 where a row is no multiple of its group.
    """
    format, group = spec.weight_format, MADE[spec.weight_format]
    codes: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    for name, matrices in weights.items():
        shape = spec.expert_shapes[name]
        if format == "int4" and shape[1] % group:
            raise ValueError(f"{name} has rows of {shape[1]} weights; method {spec.method} takes groups of {group}")
        codes[name], scales[name] = empty_codes(format, group, spec.num_experts, *shape)
        for slot, weight in enumerate(matrices):
            make_codes(weight, format, group, codes[name][slot], scales[name][slot])
            if not bool(scales[name][slot].isfinite().all()):
                _refuse(name, (slot,), ~weight.isfinite(), "is {}; it takes finite weights", weight)
    return Codes(format, group, codes, scales)


def dequantised(
    format: str, group: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """bf16 [N, K] of one expert's matrix."""
    return CodedMatrix(format, block_of(format, group), codes, scales, zeros).products().to(torch.bfloat16)
