"""Mutants of quantised base weights: other codes, scales or zero points than those of the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.engines.quantise import codes_of
from ktverify.engines.quantised import CodedMatrix, dequantised
from ktverify.mutants.base import Gradients, Group, Plain, mutant


def _groups(of: CodedMatrix) -> Tensor:
    """The number of each column's group, int64 [K]."""
    columns = torch.arange(of.q().shape[1])
    return columns // of.block[1] if of.block[1] else torch.zeros_like(columns)


@mutant(Cause.QUANTISATION, "quantised/weights/fp8", "bits")
class scale_rounded_first(Plain):
    """A scale is rounded to bf16 before it is multiplied."""

    def code_scale(self, name: str, of: CodedMatrix) -> Tensor:
        return super().code_scale(name, of).to(torch.bfloat16).float()


@mutant(Cause.QUANTISATION, "quantised/weights/mxfp4", "bits")
class halves_of_a_byte_exchanged(Plain):
    """The even code of a byte is read from its high half."""

    def q(self, of: CodedMatrix) -> Tensor:
        q = super().q(of)
        return q if of.format in ("fp8", "int8") else q.view(len(q), -1, 2).flip(-1).flatten(-2)


@mutant(Cause.QUANTISATION, "quantised/weights/int4_32", "bits")
class backward_quantised_again(Plain):
    """Backward multiplies by weights that are quantised again, a scale for each column."""

    def _of_columns(self, at: Group) -> None:
        if self.spec.weight_format != "bf16":
            again = (codes_of(weight.T, "int8", 0) for weight in at.base)
            gate, up, down = (dequantised("int8", 0, *codes, None).float().T for codes in again)
            at.base = (gate, up, down)

    def down_gradients(self, at: Group, dy: Tensor) -> tuple[Tensor, Gradients]:
        self._of_columns(at)
        return super().down_gradients(at, dy)


@mutant(Cause.QUANTISATION, "quantised/weights/int4_128", "bits")
class scale_of_the_neighbouring_block(Plain):
    """A group takes the scale of the group before it; the first one takes its own."""

    def code_scale(self, name: str, of: CodedMatrix) -> Tensor:
        return of.row_scales()[:, (_groups(of) - 1).clamp(min=0)]


@mutant(Cause.QUANTISATION, "quantised/weights/int4_zeros", "bits")
class zero_point_forgotten(Plain):
    """Zero points are not subtracted."""

    def q(self, of: CodedMatrix) -> Tensor:
        return of.numbers()


@mutant(Cause.QUANTISATION, "quantised/parts/mxfp4", "bits")
class groups_counted_from_the_part(Plain):
    """A tensor-parallel part of down_proj takes its scales from the first group on, not from its own first group."""

    def code_scale(self, name: str, of: CodedMatrix) -> Tensor:
        groups = _groups(of)
        if name == "down_proj":
            size = self.spec.moe_intermediate_size // self.spec.threadpool_count
            groups = groups[torch.arange(len(groups)) % size]
        return of.row_scales()[:, groups]
