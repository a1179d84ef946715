"""What the bench's peers with base weights as codes share. kt-kernel's Python loads this module, and has no ktverify.

Where the bench times one of them, base weights are numbers that bf16 and all four formats have exactly: `on_grid`. All
engines then compute with the same weights, and their results are compared with the same oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ktverify.bench.host import BenchInputs

METHODS = {"fp8": "AMXFP8_SFT", "int8": "AMXINT8_SFT", "int4": "AMXINT4_SFT", "mxfp4": "MXFP4_SFT"}
# the magnitudes of e2m1, doubled, that int4 has as well
_MULTIPLES = (0, 1, 2, 3, 4, 6)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32


def step_of(weights: torch.Tensor) -> float:
    """The power of two that the weights of `on_grid` are small multiples of: about their standard deviation / 2."""
    return float(2.0 ** round(math.log2(float(weights.float().std()) / 2)))


def on_grid(weights: torch.Tensor, step: float) -> torch.Tensor:
    """bf16 [E, N, K] -> bf16 of that shape: the nearest of 0, ±1, ±2, ±3, ±4 and ±6 times `step`."""
    import torch

    multiples = torch.tensor(_MULTIPLES, dtype=torch.float32)
    between = (multiples[1:] + multiples[:-1]) / 2
    made = torch.empty_like(weights)
    for to, expert in zip(made, weights.float() / step, strict=True):
        to.copy_(multiples[torch.bucketize(expert.abs(), between)] * expert.sign() * step)
    return made


def codes_of(format: str, weights: torch.Tensor, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) as load_weights_from_tensors takes them, docs/contract.md, of weights [E, N, K] on the grid."""
    import torch

    experts, rows, columns = weights.shape
    q = weights.float() / step
    groups = (experts, rows, columns // _GROUP)
    if format == "fp8":
        scales = torch.full((experts, -(-rows // 128), -(-columns // 128)), step)
        return q.to(torch.float8_e4m3fn), scales
    if format == "int8":
        return q.to(torch.int8), torch.full((experts, rows), step)
    if format == "int4":
        code = (q + 8).to(torch.uint8)
        packed = (code[..., 0::2] | code[..., 1::2] << 4).contiguous().view(torch.int32)
        return packed, torch.full(groups, step, dtype=torch.bfloat16)
    code = torch.bucketize(q.abs() / 2, torch.tensor(_E2M1)).to(torch.uint8) | (q < 0).to(torch.uint8) << 3
    scale = 127 + round(math.log2(2 * step))
    return code[..., 0::2] | code[..., 1::2] << 4, torch.full(groups, scale, dtype=torch.uint8)


def layer_of(inputs: BenchInputs, factory: Callable[..., Any], format: str, **arguments: Any) -> Any:
    """A layer of `factory` whose base weights are codes; format: of METHODS."""
    import torch

    layer = factory(**{**inputs.arguments, "method": METHODS[format], **arguments})
    made = []
    for name in inputs.base_names:
        each = [codes_of(format, expert[None], inputs.step) for expert in inputs.tensors[name]]
        made.append(tuple(torch.cat(parts) for parts in zip(*each, strict=True)))
    gate, up, down = made
    physical_map = torch.arange(len(gate[0]), dtype=torch.int64)
    layer.load_weights_from_tensors(gate[0], up[0], down[0], physical_map, scales=(gate[1], up[1], down[1]))
    layer.init_lora_weights(*(inputs.tensors[name] for name in inputs.lora_names))
    return layer
