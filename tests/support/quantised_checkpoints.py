"""Whole checkpoints with INT4 in compressed-tensors' form, and the same dequantised, by plain code of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

GROUP = 32
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
    "ignore": ["lm_head"],
}
_LINEAR = re.compile(r"(_proj|\.w[123])\.weight$")


def in_int4(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors with linear layers and experts in INT4, a bf16 scale for 32 weights, the same dequantised)."""
    quantised, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not _LINEAR.search(name):
            continue
        rows, columns = weight.shape
        groups = weight.float().view(rows, columns // GROUP, GROUP)
        scales = (groups.abs().amax(-1) / 7).bfloat16()
        q = (groups / scales.float()[..., None]).round().clamp(-8, 7)
        plain[name] = (q * scales.float()[..., None]).bfloat16().view(rows, columns)
        words = torch.zeros(rows, columns // 8, dtype=torch.int64)
        for place in range(8):
            words += (q.view(rows, columns)[:, place::8].long() + 8) << (4 * place)
        packed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        del quantised[name]
        quantised |= {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": torch.tensor([rows, columns])}
    return quantised, plain
