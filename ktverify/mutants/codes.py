"""One expert's quantised matrix as the mutants read it: what each weight's q, zero point and scale are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktverify.engines.quantised import Codes
from ktverify.judge.dequantise import VALUES

_METHODS = {"fp8": "AMXFP8_SFT", "int8": "AMXINT8_SFT", "int4": "AMXINT4_SFT", "mxfp4": "MXFP4_SFT"}


@dataclass(frozen=True)
class CodedExpert:
    """A matrix [N, K] of one expert by its name; codes, scales and zeros as load_weights_from_tensors takes them."""

    name: str
    format: str
    group: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def numbers(self) -> Tensor:
        """The code of each weight, int64 [N, K]."""
        codes = self.codes.view(torch.uint8).long()
        if self.format in ("fp8", "int8"):
            return codes
        return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)

    def q(self) -> Tensor:
        """The value of each weight's code, fp32 [N, K]."""
        return torch.tensor(VALUES[_METHODS[self.format]])[self.numbers()]

    def groups(self) -> Tensor:
        """The number of each column's group, int64 [K]."""
        columns = torch.arange(self.numbers().shape[1])
        return columns // self.group if self.group else torch.zeros_like(columns)

    def narrow_scales(self) -> Tensor:
        """fp32 [N, groups]."""
        scales = self.scales
        if self.format == "mxfp4":
            scales = (2.0 ** (scales.view(torch.uint8).double() - 127)).float()
        if self.format == "int8":
            scales = scales[:, None]
        if self.format == "fp8":
            scales = scales.repeat_interleave(128, 0)[: len(self.codes)]
        return scales.float()

    def scale(self) -> Tensor:
        """The scale of each weight, fp32 [N, K]."""
        return self.narrow_scales()[:, self.groups()]

    def zero_point(self) -> Tensor:
        """The zero point of each weight, fp32 [N, K]; 0 where there is none."""
        return torch.zeros(1) if self.zeros is None else self.zeros.float()[:, self.groups()]


def of_slots(found: Codes, name: str) -> Iterator[CodedExpert]:
    """The matrix `name` of each slot."""
    zeros = found.zero_points[name] if found.zero_points is not None else [None] * len(found.codes[name])
    for codes, scales, zero in zip(found.codes[name], found.scales[name], zeros, strict=True):
        yield CodedExpert(name, found.format, found.group, codes, scales, zero)
