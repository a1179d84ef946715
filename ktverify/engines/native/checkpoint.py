"""Base weights of the routed experts of one layer, from a checkpoint in safetensors.

The tensors are views of mapped files; only the headers are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ktverify.spec.names import BASE_NAMES

INDEX = "model.safetensors.index.json"

# names of an expert's matrices in model families, after any prefix
FAMILIES: dict[str, dict[str, str]] = {
    "DeepSeek, Qwen, GLM, OLMoE": {
        name: f"layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight" for name in BASE_NAMES
    },
    "Mixtral": {
        name: f"layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{short}.weight"
        for name, short in zip(BASE_NAMES, ("w1", "w3", "w2"), strict=True)
    },
}


def expert_weights(
    weight_path: str, layer: int, shapes: Mapping[str, tuple[int, int]], experts: int
) -> dict[str, list[torch.Tensor]]:
    """gate_proj, up_proj [I, H], down_proj [H, I] bf16 of each expert, by BASE_NAMES; shapes: the expected ones.

    ValueError for a missing path or tensor, another shape, or a checkpoint with more experts; TypeError for another
    dtype.
    """
    names = _of_layer(_tensors(weight_path), layer)
    family = next((f for f in FAMILIES.values() if f[BASE_NAMES[0]].format(layer=layer, expert=0) in names), None)
    if family is None:
        wanted = " or ".join(f[BASE_NAMES[0]].format(layer=layer, expert=0) for f in FAMILIES.values())
        raise ValueError(f"weight_path {weight_path!r} holds no routed experts of layer {layer}: no {wanted}")
    if family[BASE_NAMES[0]].format(layer=layer, expert=experts) in names:
        raise ValueError(f"weight_path {weight_path!r}, layer {layer}, has more experts than num_experts ({experts})")
    files: dict[Path, Any] = {}
    return {
        name: [
            _view(files, names, pattern.format(layer=layer, expert=expert), shapes[name], weight_path)
            for expert in range(experts)
        ]
        for name, pattern in family.items()
    }


def _tensors(weight_path: str) -> dict[str, Path]:
    """The file of each tensor, by its full name."""
    path = Path(weight_path).expanduser()
    if not weight_path or not path.exists():
        raise ValueError(f"weight_path is {weight_path!r}; it takes a safetensors file or a folder of them")
    if path.is_file():
        return dict.fromkeys(_keys(path), path)
    if (path / INDEX).is_file():
        listed: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: path / file for name, file in listed.items()}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"weight_path {weight_path!r} has no *.safetensors; it takes a safetensors file or a folder")
    return {name: file for file in files for name in _keys(file)}


def _keys(file: Path) -> Iterable[str]:
    try:
        with safe_open(file, "pt") as opened:
            keys: list[str] = list(opened.keys())
    except Exception as error:  # the library raises exceptions of its own and others
        raise ValueError(f"{file} is no safetensors file: {error}") from None
    return keys


def _of_layer(tensors: Mapping[str, Path], layer: int) -> dict[str, tuple[str, Path]]:
    """The tensors of one layer: name from "layers.N." on -> (full name, file)."""
    found = {}
    for name, file in tensors.items():
        match = re.search(rf"(?:^|\.)(layers\.{layer}\..*)", name)
        if match:
            found[match[1]] = (name, file)
    return found


def _view(
    files: dict[Path, Any], names: Mapping[str, tuple[str, Path]], name: str, shape: tuple[int, int], weight_path: str
) -> torch.Tensor:
    """A tensor that reads its pages from the file when they are used."""
    if name not in names:
        raise ValueError(f"weight_path {weight_path!r} has no {name}")
    full, file = names[name]
    if file not in files:
        if not file.is_file():
            raise ValueError(f"{INDEX} names {file.name}, which is not in {weight_path!r}")
        files[file] = safe_open(file, "pt")
    tensor: torch.Tensor = files[file].get_tensor(full)
    if tensor.dtype is not torch.bfloat16:
        raise TypeError(f"{full} has dtype {tensor.dtype}; it takes torch.bfloat16")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{full} has shape {list(tensor.shape)}; the layer takes {list(shape)}")
    return tensor
