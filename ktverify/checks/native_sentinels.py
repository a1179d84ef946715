"""Sentinels around what the native engine writes: a byte too far in either direction shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ktverify.checks.check import check
from ktverify.checks.target import ODD, Target, expect
from ktverify.engines.run import run_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs

GUARD = 4096  # bytes on either side, beyond any vector, tile or panel row
PATTERN = 0xA5
# remainders of every block, more rows than a group, parts of their own
CASES = (ODD, Case.parse("E=4,k=2,H=130,I=92,T=37,r=5,alpha=8,lora=float32"), Case.parse("E=2,k=1,H=1,I=4,T=1,r=1"))


class Guards:
    """Memory with a pattern around each tensor that was asked for."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """Stands in for torch.empty: the pattern inside as well, so that what is not written shows."""
        size = math.prod(shape) * dtype.itemsize
        block = torch.full((GUARD + size + GUARD,), PATTERN, dtype=torch.uint8)
        self.blocks.append(block)
        return block[GUARD : GUARD + size].view(dtype).view(tuple(shape))

    def gradients(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, *, written: int) -> Any:
        """Stands in for the memory of dropped LoRA gradients, which is not zero."""
        return [self.empty(shape, dtype=dtype) for shape in shapes], False

    def broken(self) -> list[int]:
        """The number of each block whose pattern has changed."""
        around = [torch.cat((block[:GUARD], block[-GUARD:])) for block in self.blocks]
        return [number for number, guard in enumerate(around) if bool((guard != PATTERN).any())]


@check("native", "Results are written to their last byte, and nothing beside them.", native=True, internal=True)
def check_sentinels(target: Target) -> None:
    """AssertionError unless forward and backward write every byte of their results and none beside them."""
    # importing it loads the compiled engine, which must not happen before a process is forked
    from ktverify.engines.native import layer as native_layer

    for case in CASES:
        inputs = make_inputs(case)
        for tp in (1, 4) if case.intermediate % 4 == 0 else (1,):
            expected = run_layer(target.layer(case, inputs, tp=tp), inputs)
            layer: Any = target.layer(case, inputs, tp=tp)
            guards = Guards()
            with (
                mock.patch.object(torch, "empty", guards.empty),
                mock.patch.object(native_layer, "_gradients", guards.gradients),
            ):
                found = run_layer(layer, inputs)
            expect(len(guards.blocks) >= len(found), f"{len(guards.blocks)} guarded results of {len(found)}")
            expect(not guards.broken(), f"{case.id}, TP {tp}: written beside results {guards.broken()}")
            target.expect_same_bits(f"{case.id}, TP {tp}: with sentinels and without", expected, found)
            # the sentinels do see a byte too far
            guards.blocks[-1][GUARD - 1] ^= 1
            expect(guards.broken() == [len(guards.blocks) - 1], "a byte before a result was changed, and not seen")
