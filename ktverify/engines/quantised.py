"""Quantised base weights as a caller gives them: their checks, and codes made of bf16 weights.

docs/contract.md, "Quantised base weights", has the formats and the rule. Matrices are [N, K]: gate_proj and up_proj
[I, H], down_proj [H, I].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktverify.engines.argument_checks import LayerSpec, check_tensor, shown, tp_degrees
from ktverify.spec.names import BASE_NAMES

if TYPE_CHECKING:
    import torch

FP8_BLOCK = 128
INT4_GROUPS = (32, 128)
MXFP4_GROUP = 32


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


def check_codes(spec: LayerSpec, weights: Sequence[Any], scales: Any, zero_points: Any) -> Codes:
    """The Codes of the arguments of load_weights_from_tensors. TypeError or ValueError that names the tensor;
    RuntimeError, with the degrees that work, where a tensor-parallel part would begin inside a group.

    int8 and int4 of bf16 weights without scales are quantised here, expert by expert.
    """
    import torch

    kind = spec.weight_format
    makes = kind in ("int8", "int4") and scales is None and zero_points is None
    if makes and all(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16 for tensor in weights):
        found = quantise(spec, weights)
    else:
        found = _given(spec, weights, scales, zero_points)
        for name in BASE_NAMES:
            _check_values(name, found)
    size = spec.moe_intermediate_size
    if kind in ("int4", "mxfp4") and size // spec.threadpool_count % found.group:
        works = [degree for degree in tp_degrees(size) if size // degree % found.group == 0]
        raise RuntimeError(
            f"For TP, moe_intermediate_size ({size}) divided by threadpool_count ({spec.threadpool_count}) must be a "
            f"multiple of the {found.group} columns of down_proj that share a scale; degrees that would work: "
            f"{', '.join(map(str, works))}"
        )
    return found


def _given(spec: LayerSpec, weights: Sequence[Any], scales: Any, zero_points: Any) -> Codes:
    import torch

    kind, experts = spec.weight_format, spec.num_experts
    given_scales = _three("scales", scales, spec.method)
    given_zeros = None if zero_points is None else _three("zero_points", zero_points, spec.method)
    if given_zeros is not None and kind != "int4":
        raise TypeError(f"zero_points were given; method {spec.method} has none: pass None")
    code_dtype, scale_dtypes = {
        "fp8": (torch.float8_e4m3fn, (torch.float32,)),
        "int8": (torch.int8, (torch.float32,)),
        "int4": (torch.int32, (torch.bfloat16,)),
        "mxfp4": (torch.uint8, (torch.uint8, torch.float8_e8m0fnu)),
    }[kind]
    group = {"fp8": FP8_BLOCK, "int8": 0, "mxfp4": MXFP4_GROUP}.get(kind, 0)
    codes, found_scales, zeros = {}, {}, {}
    for position, (name, (rows, columns)) in enumerate(spec.expert_shapes.items()):
        if kind in ("int4", "mxfp4") and columns % 32:
            groups = "groups of 32 or 128" if kind == "int4" else "groups of 32"
            raise ValueError(f"{name} has rows of {columns} weights; method {spec.method} takes {groups}")
        per_code = {"int4": 8, "mxfp4": 2}.get(kind, 1)
        codes[name] = _plain(name, weights[position], (experts, rows, columns // per_code), (code_dtype,))
        if kind == "int4":
            group = _int4_group(f"the scales of {name}", given_scales[position], columns, group)
        shape: tuple[int, ...] = (experts, rows) if kind == "int8" else (experts, rows, -(-columns // group))
        if kind == "fp8":
            shape = (experts, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        found_scales[name] = _plain(f"the scales of {name}", given_scales[position], shape, scale_dtypes)
        if given_zeros is not None:
            zeros[name] = _plain(f"the zero points of {name}", given_zeros[position], shape, (torch.int8,))
    return Codes(kind, group, codes, found_scales, zeros or None)


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
    from ktverify.engines.plain_tensors import values_of

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


def _check_values(name: str, found: Codes) -> None:
    """ValueError for a code of NaN, a scale that is not finite or below 0, and a zero point that no code has."""
    import torch

    for expert, codes in enumerate(found.codes[name]) if found.format == "fp8" else ():
        _refuse(name, expert, (codes.view(torch.uint8) & 0x7F) == 0x7F, "is NaN; it takes finite codes of e4m3")
    scales, what = found.scales[name], f"the scales of {name}"
    for expert, of_expert in enumerate(scales):
        if found.format == "mxfp4":
            _refuse(what, expert, of_expert.view(torch.uint8) == 0xFF, "is NaN; it takes 0 to 254, of e8m0")
        else:
            bad = ~(of_expert.isfinite() & (of_expert >= 0))
            _refuse(what, expert, bad, "is {}; it takes finite numbers of 0 or more", of_expert)
    for expert, of_expert in enumerate(found.zero_points[name] if found.zero_points is not None else ()):
        _refuse(f"the zero points of {name}", expert, (of_expert < -8) | (of_expert > 7), "is {}; it takes -8 to 7",
                of_expert)  # fmt: skip


def _refuse(what: str, expert: int, bad: torch.Tensor, says: str, values: torch.Tensor | None = None) -> None:
    """ValueError with the first position where `bad` is true."""
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        value = "" if values is None else float(values[place])
        raise ValueError(f"{what}: [{', '.join(map(str, (expert, *place)))}] {says.format(value)}")


# ---- codes of bf16 weights


def quantise(spec: LayerSpec, weights: Sequence[Any]) -> Codes:
    """The Codes of bf16 weights, for int8 (a scale for each row) or int4 (groups of 32), by the contract's rule.

    ValueError for a NaN or Inf, and for int4 where rows are no multiple of 32.
    """
    import torch

    kind, experts = spec.weight_format, spec.num_experts
    group = 32 if kind == "int4" else 0
    codes, scales = {}, {}
    for (name, shape), given in zip(spec.expert_shapes.items(), weights, strict=True):
        if group and shape[1] % group:
            raise ValueError(f"{name} has rows of {shape[1]} weights; method {spec.method} takes groups of {group}")
        from ktverify.engines.plain_tensors import values_of

        checked = values_of(check_tensor(name, given, (experts, *shape), (torch.bfloat16,)))
        made = []
        for expert, weight in enumerate(checked):
            _refuse(name, expert, ~weight.isfinite(), "is {}; it takes finite weights", weight)
            made.append((int4_of if group else int8_of)(weight))
        codes[name], scales[name] = (torch.stack(each) for each in zip(*made, strict=True))
    return Codes(kind, group, codes, scales)


def int8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] and fp32 scales [N] of bf16 [N, K]."""
    import torch

    scale = weight.float().abs().amax(-1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def int4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [N, K / 8], eight codes of 4 bits each, the first in the lowest, and bf16 scales [N, K / 32] of bf16."""
    import torch

    grouped = weight.float().view(len(weight), -1, 32)
    scale = (grouped.abs().amax(-1) / 7).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    code = ((grouped / scale.float()[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(-2)
    return (code[..., 0::2] | code[..., 1::2] << 4).contiguous().view(torch.int32), scale


def dequantised(
    format: str, group: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """bf16 [N, K] of one expert's matrix."""
    import torch

    if format in ("fp8", "int8"):
        q = codes.float()
        if format == "int8":
            return (q * scales[:, None]).to(torch.bfloat16)
        rows, columns = (torch.arange(size, device="cpu") // group for size in q.shape)
        return (q * scales[rows][:, columns]).to(torch.bfloat16)
    halves = codes.view(torch.uint8)
    code = torch.stack((halves & 15, halves >> 4), dim=-1).flatten(-2)
    if format == "int4":
        value = code.to(torch.int32) - 8
        value = value if zeros is None else value - zeros.repeat_interleave(group, dim=-1)
        return (value.float() * scales.float().repeat_interleave(group, dim=-1)).to(torch.bfloat16)
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
    value = torch.where(code < 8, e2m1[(code & 7).long()], -e2m1[(code & 7).long()])
    scale = scales.view(torch.float8_e8m0fnu).float()
    return (value * scale.repeat_interleave(group, dim=-1)).to(torch.bfloat16)
