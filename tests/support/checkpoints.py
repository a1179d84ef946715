"""Checkpoints of one model in the forms that people have: in several files, in FP8, with names of other times."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktverify.engines.checkpoint_files import INDEX

BLOCK = 128
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
_LINEAR = re.compile(r"(_proj|_proj_with_mqa|\.w[123])\.weight$")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def written(source: Path, target: Path, tensors: Mapping[str, Tensor], *, files: int = 1, **config: Any) -> Path:
    """The checkpoint `source` with other tensors, in several files with an index, and `config` over its own."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors)
    weight_map = {}
    for number in range(files):
        file = "model.safetensors" if files == 1 else f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[number::files]}, target / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names[number::files], file))
    if files > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        (target / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}, indent=2))
    return target


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [N, K], float32 scales [⌈N / 128⌉, ⌈K / 128⌉]) of a weight, block by block."""
    rows, columns = weight.shape
    numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[block].float().abs().max() / 448
            numbers[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return numbers, scales


def from_fp8(numbers: Tensor, scales: Tensor) -> Tensor:
    """The bf16 weight, by a loop over the blocks."""
    weight = torch.empty(numbers.shape, dtype=torch.bfloat16)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            weight[block] = (numbers[block].float() * scales[i, j]).bfloat16()
    return weight


def in_fp8(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors with linear layers and experts in FP8, the same dequantised)."""
    quantised, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if _LINEAR.search(name):
            numbers, scales = to_fp8(tensor)
            quantised[name], quantised[f"{name}_scale_inv"] = numbers, scales
            plain[name] = from_fp8(numbers, scales)
    return quantised, plain


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the experts of each layer in two, by the names of transformers 5."""
    pattern = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
    found = {name.replace(".block_sparse_moe.", ".mlp."): t for name, t in tensors.items() if not pattern.match(name)}
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := pattern.match(name):
            layer, expert, projection = match.groups()
            parts.setdefault((layer, projection), {})[int(expert)] = tensor
    for layer in {layer for layer, _ in parts}:
        gate, up, down = (
            torch.stack([one[e] for e in sorted(one)])
            for names in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
            for one in [next(parts[layer, name] for name in names if (layer, name) in parts)]
        )
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"{layer}.mlp.experts.down_proj"] = down
    return found


def with_further_layer(tensors: Mapping[str, Tensor], last: int) -> dict[str, Tensor]:
    """The tensors with one more layer, of zeros, behind the last, as models have that predict further tokens."""
    more = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        if f".layers.{last}." in name
    }
    return {**tensors, **more, f"model.layers.{last + 1}.eh_proj.weight": torch.ones(4, 8, dtype=torch.bfloat16)}
