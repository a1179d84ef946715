"""export-adapter: LoRA of the routed experts from one file format to another, without changing a value.

fused: peft's for stacked parameters, where gate and up share their A. per-expert: one LoRA for each projection of each
expert, `experts.{e}.gate_proj.lora_A.weight` …, as vLLM and SGLang name them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from ktverify.system.text import read_json
from ktverify.training.adapter import base_of
from ktverify.training.factors import Factors
from ktverify.training.output_directory import whole_directory
from ktverify.training.pretrained import load_form
from ktverify.training.wrap import find_experts

FORMATS = ("peft", "per-expert")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_STACKED = ("gate_up_proj", "down_proj")
# keys of a configuration by which ranks or scalings differ between tensors
_UNEVEN = ("rank_pattern", "alpha_pattern")
# (A [E, r, in], B [E, out, r]) of gate, up and down
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def export_adapter(adapter: Path, out: Path, form: str, *, base: str | None = None, trust: bool = False) -> Path:
    """Write the adapter in the directory `adapter`, of either format, to `out` in the format `form`; return `out`.

    base: the base model's path, by default the one that the adapter names; its weights are not read. To peft's format,
    gate and up with different A get one of twice the rank, and everything else is padded with zeros: no delta changes.
    ValueError for a format that is unknown, an adapter without LoRA on all experts, or a base whose experts have other
    names than gate_proj, up_proj and down_proj.
    """
    if form not in FORMATS:
        raise ValueError(f"--format is {form!r}, it takes {' or '.join(FORMATS)}")
    if out.exists():
        raise ValueError(f"{out} exists: name another directory")
    model = load_form(base_of(adapter, base), "bfloat16", option="--base", trust=trust)
    config = read_json(adapter / CONFIG)
    if uneven := [name for name in _UNEVEN if config.get(name)]:
        raise ValueError(
            f"{adapter}/{CONFIG} has a {uneven[0]}: one rank and one alpha for all tensors can be converted"
        )
    if isinstance(config.get("target_modules"), str):
        raise ValueError(f"{adapter}/{CONFIG} has a pattern as target_modules: a list of names can be converted")
    if getattr(model.config, "model_type", "") == "mixtral":
        raise ValueError("the experts of mixtral are w1, w2 and w3: their per-expert names are not converted yet")
    tensors = peft.utils.save_and_load.load_peft_weights(str(adapter), device="cpu")
    found = {name: _read(tensors, name, block) for name, block in _blocks(model)}
    if form == "per-expert":
        for name, pairs in found.items():
            tensors |= _per_expert(name, pairs)
        config["target_modules"] = sorted({*(config["target_modules"] or ()), *_PROJECTIONS})
        config["target_parameters"] = None
    else:
        config["target_modules"] = sorted({*(config["target_modules"] or ())} - set(_PROJECTIONS))
        config["target_parameters"] = [f"experts.{name}" for name in _STACKED]
        if any(not torch.equal(pairs[0][0], pairs[1][0]) for pairs in found.values()):
            config["lora_alpha"] *= math.sqrt(2) if config.get("use_rslora") else 2
            config["r"] *= 2
            tensors = {name: _padded(name, tensor) for name, tensor in tensors.items()}
        for name, pairs in found.items():
            tensors |= _fused(name, pairs, int(config["r"]))
    with whole_directory(out) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / TENSORS, {"format": "pt"})
    return out


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the model, block) of every block of routed experts."""
    blocks = find_experts(model)
    for name, module in model.named_modules():
        if any(module is block for block in blocks):
            yield name, module


def _read(tensors: dict[str, torch.Tensor], name: str, block: Any) -> Pairs:
    """The pairs of one block, taken out of `tensors`."""
    experts, hidden, intermediate = block.down_proj.shape
    one = f"{_PREFIX}{name}.0.gate_proj.lora_A.weight"
    if one in tensors:
        return [
            (
                torch.stack([_take(tensors, f"{_PREFIX}{name}.{e}.{kind}.lora_A.weight") for e in range(experts)]),
                torch.stack([_take(tensors, f"{_PREFIX}{name}.{e}.{kind}.lora_B.weight") for e in range(experts)]),
            )
            for kind in _PROJECTIONS
        ]
    stacked = {}
    for place in (".base_layer", ""):
        a, b = (_take(tensors, f"{_PREFIX}{name}{place}.lora_{letter}.weight") for letter in "AB")
        for kind, sizes in (("gate_up_proj", (hidden, 2 * intermediate)), ("down_proj", (intermediate, hidden))):
            have = (a.shape[1], b.shape[0])
            if have in (sizes, sizes[::-1]):
                turned = have != sizes or (sizes[0] == sizes[1] and _turned_here())
                stacked[kind] = Factors(a, b, 1.0, turned).of_experts(experts)
    if len(stacked) != 2:
        raise ValueError(f"the adapter's LoRA of {name} has other sizes than the base: {experts} experts of {hidden}")
    (a, b), down = stacked["gate_up_proj"], stacked["down_proj"]
    return [(a, b[:, :intermediate]), (a, b[:, intermediate:]), down]


def _take(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(f"the adapter has no {name}: it takes one with LoRA on every expert's gate, up and down")
    return tensors.pop(name)


def _per_expert(name: str, pairs: Pairs) -> dict[str, torch.Tensor]:
    return {
        # gate and up may share their A, and one file holds no tensor twice
        f"{_PREFIX}{name}.{e}.{kind}.lora_{letter}.weight": tensor[e].clone()
        for kind, pair in zip(_PROJECTIONS, pairs, strict=True)
        for letter, tensor in zip("AB", pair, strict=True)
        for e in range(len(tensor))
    }


def _fused(name: str, pairs: Pairs, rank: int) -> dict[str, torch.Tensor]:
    """peft's names: gate_up_proj is the inner of two wrappers, down_proj the outer. rank: what the tensors get."""
    (gate_a, gate_b), (up_a, up_b), down = pairs
    if torch.equal(gate_a, up_a) and gate_a.shape[1] == rank:
        joined = gate_a, torch.cat([gate_b, up_b], dim=1)
    else:
        a, zeros = torch.cat([gate_a, up_a], dim=1), torch.zeros_like(gate_b)
        joined = a, torch.cat([torch.cat([gate_b, zeros], dim=2), torch.cat([zeros, up_b], dim=2)], dim=1)
    missing = rank - down[0].shape[1]
    down = (
        torch.nn.functional.pad(down[0], (0, 0, 0, missing)),
        torch.nn.functional.pad(down[1], (0, missing)),
    )
    found = {}
    for place, (a, b) in ((".base_layer", joined), ("", down)):
        if _turned_here():
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        # the expert's index is the slowest of A's rows, and the fastest of B's columns
        found[f"{_PREFIX}{name}{place}.lora_A.weight"] = a.reshape(-1, a.shape[2])
        found[f"{_PREFIX}{name}{place}.lora_B.weight"] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return found


def _padded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor beside the experts with twice its rank, the new half zero."""
    if name.endswith("lora_A.weight"):
        return torch.cat([tensor, torch.zeros_like(tensor)])
    return torch.cat([tensor, torch.zeros_like(tensor)], dim=1) if name.endswith("lora_B.weight") else tensor


def _turned_here() -> bool:
    """Whether the installed peft has the factors of stacked parameters the other way round; see Factors."""
    return tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
