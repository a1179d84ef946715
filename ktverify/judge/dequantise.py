"""The bf16 weights that codes stand for, and the codes of bf16 weights, by docs/contract.md: the right answer, from no
engine.

A Coding says how codes stand for base weights. Codes are plain here, one number [0, 256) or [0, 16) for each weight
[E, N, K]; `packed` puts them into the tensors that an engine takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coding:
    """One way to store weights as codes. group: columns that share a scale, 0 for a whole row; zeros: zero points;
    scales: their dtype."""

    label: str
    method: str
    group: int
    zeros: bool = False
    scales: torch.dtype = torch.float32

    @property
    def bits(self) -> int:
        return 8 if self.method in ("AMXFP8_SFT", "AMXINT8_SFT") else 4

    def scale_shape(self, experts: int, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the scales of a matrix [rows, columns]."""
        if self.group == 0:
            return experts, rows
        return experts, -(-rows // 128) if self.method == "AMXFP8_SFT" else rows, -(-columns // self.group)


CODINGS = {
    coding.label: coding
    for coding in (
        Coding("fp8", "AMXFP8_SFT", 128),
        Coding("int8", "AMXINT8_SFT", 0),
        Coding("int4_32", "AMXINT4_SFT", 32, scales=torch.bfloat16),
        Coding("int4_128", "AMXINT4_SFT", 128, scales=torch.bfloat16),
        Coding("int4_zeros", "AMXINT4_SFT", 32, zeros=True, scales=torch.bfloat16),
        Coding("int4_fp16", "AMXINT4_SFT", 128, scales=torch.float16),
        Coding("int4_fp32", "AMXINT4_SFT", 32, scales=torch.float32),
        Coding("mxfp4", "MXFP4_SFT", 32, scales=torch.uint8),
    )
}


def _minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The number of sign, exponent and mantissa, from the highest bit on; the bias is 2^(exponent_bits - 1) - 1."""
    sign, rest = divmod(code, 1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = divmod(rest, 1 << mantissa_bits)
    least = 2 - (1 << (exponent_bits - 1))
    fraction = mantissa / (1 << mantissa_bits)
    value = fraction * 2.0**least if exponent == 0 else (1 + fraction) * 2.0 ** (least + exponent - 1)
    return -value if sign else value


VALUES = {
    "AMXFP8_SFT": [_minifloat(code, 4, 3) for code in range(256)],
    "AMXINT8_SFT": [float(code - 256 if code >= 128 else code) for code in range(256)],
    "AMXINT4_SFT": [float(code - 8) for code in range(16)],
    "MXFP4_SFT": [_minifloat(code, 2, 1) for code in range(16)],
}
# in e4m3: the two codes that are no number
NAN_CODES = (0x7F, 0xFF)


def weights_of(coding: Coding, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """bf16 [E, N, K] of uint8 codes [E, N, K]; scales as an engine gets them, zeros int8 of their shape."""
    q = torch.tensor(VALUES[coding.method], device="cpu")[codes.long()]
    scale = (2.0 ** (scales.double() - 127)).float() if coding.method == "MXFP4_SFT" else scales.float()
    if zeros is not None:
        q = q - over_weights(coding, zeros.float(), codes.shape)
    return (q * over_weights(coding, scale, codes.shape)).to(torch.bfloat16)


def codes_of(coding: Coding, weights: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes [E, N, K] and scales, as an engine takes them, of finite bf16 weights [E, N, K]. No zero points."""
    experts, rows, columns = weights.shape
    height, width = (128 if coding.method == "AMXFP8_SFT" else 1), coding.group or columns
    most = {"AMXFP8_SFT": 448, "AMXINT8_SFT": 127, "AMXINT4_SFT": 7}[coding.method]
    scales = torch.empty(experts, -(-rows // height), -(-columns // width), device="cpu")
    for row in range(scales.shape[1]):
        for column in range(scales.shape[2]):
            block = weights[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
            scales[:, row, column] = block.abs().flatten(1).max(1).values.float() / most
    scales = scales.to(coding.scales)
    scales[scales == 0] = 1
    scales = scales.reshape(coding.scale_shape(experts, rows, columns))
    quotients = weights.float() / over_weights(coding, scales.float(), weights.shape)
    if coding.method == "AMXFP8_SFT":
        # of the numbers 0 to 448, whose codes are 0 to 126: the nearest, of two the one with an even code
        numbers = torch.tensor(VALUES[coding.method][: NAN_CODES[0]], device="cpu")
        middle = (numbers[1:] + numbers[:-1]) / 2
        below = torch.searchsorted(middle, quotients.abs())
        tie = (quotients.abs() == middle[below.clamp(max=len(middle) - 1)]) & (below % 2 == 1)
        return (below + tie.long() + 128 * quotients.signbit()).to(torch.uint8), scales
    # codes count up from -8, or are the two's complement
    codes = quotients.round().clamp(-most - (coding.bits == 4), most).long()
    return (codes + 8 if coding.bits == 4 else codes % 256).to(torch.uint8), scales


def over_weights(coding: Coding, values: Tensor, shape: torch.Size) -> Tensor:
    """A number of each group [E, …] as one of each weight, `shape`."""
    if coding.group == 0:
        return values[..., None].expand(shape)
    if coding.method == "AMXFP8_SFT":
        values = values.repeat_interleave(128, 1)[:, : shape[1]]
    return values.repeat_interleave(coding.group, 2)[..., : shape[2]]


def packed(coding: Coding, codes: Tensor) -> Tensor:
    """The tensor of uint8 codes [E, N, K] that load_weights_from_tensors takes."""
    if coding.method == "AMXFP8_SFT":
        return codes.contiguous().view(torch.float8_e4m3fn)
    if coding.method == "AMXINT8_SFT":
        return codes.contiguous().view(torch.int8)
    if coding.method == "MXFP4_SFT":
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int64, device="cpu")
    for place in range(8):
        words |= codes[..., place::8].long() << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
