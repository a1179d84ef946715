"""export-adapter: LoRA of the routed experts from one file format to another, without changing what it computes.

peft: stock peft's for stacked parameters, where gate and up share their A. per-expert: one LoRA for each projection of
each expert, by the names of the base's checkpoint, as vLLM and SGLang read them. kt: that of kt-kernel 0.7.2,
fused_expert_lora.safetensors in bfloat16 with a manifest. LoRA beside the experts has the same names in all three.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers.core_model_loading import revert_weight_conversion

from ktverify.errors import one_line
from ktverify.system.text import read_json
from ktverify.training.adapter import KT_TENSORS, base_of
from ktverify.training.factors import Factors
from ktverify.training.output_directory import whole_directory
from ktverify.training.pretrained import load_form
from ktverify.training.wrap import WEIGHTS, find_experts

FORMATS = ("peft", "per-expert", "kt")
CONFIG, TENSORS, KT_MANIFEST = "adapter_config.json", "adapter_model.safetensors", "kt_adapter_manifest.json"
_PREFIX = "base_model.model."
_KINDS = ("gate", "up", "down")
# keys of a configuration by which ranks or scalings differ between tensors
_UNEVEN = ("rank_pattern", "alpha_pattern")
_FACTOR = re.compile(r"\.lora_[AB]\.")
_FIRST_EXPERT = re.compile(r"\.0\.(\w+)\.weight$")
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Adapter:
    """config: its adapter_config.json. others: tensors beside the experts, by name. blocks: (A [E, r, in],
    B [E, out, r]) of gate, up and down, by the name that a block of experts has in the model. names: those of gate, up
    and down of one expert of a block in the base's checkpoint, with {} for its number; none where it has them stacked.
    """

    config: dict[str, Any]
    others: dict[str, Tensor]
    blocks: dict[str, list[Pair]]
    names: dict[str, list[str]]

    @property
    def projections(self) -> set[str]:
        """The last parts of `names`, like gate_proj or w1."""
        return {name.rpartition(".")[2] for names in self.names.values() for name in names}

    def beside(self, projection: str) -> list[str]:
        """The tensors of `others` with LoRA of a module of this name, like shared experts' gate_proj."""
        return [name for name in self.others if f".{projection}.lora_" in name]


def export_adapter(adapter: Path, out: Path, form: str, *, base: str | None = None, trust: bool = False) -> Path:
    """Write the adapter in the directory `adapter`, of any of the FORMATS, to `out` in the format `form`; return `out`.

    base: the base model's path, by default the one that the adapter names; its weights are not read. To peft's format,
    gate and up with different A get one of twice the rank, and all else is padded with zeros; such a padding is taken
    away again on the way back. rslora becomes an alpha with the same scaling, because not every reader knows it. To
    kt's format, the experts' factors are rounded to bfloat16.
    ValueError for a format that is unknown, an adapter without LoRA on all experts or with several ranks, and for LoRA
    that the format has no name for.
    """
    if form not in FORMATS:
        raise ValueError(f"--format is {form!r}, it takes {', '.join(FORMATS)}")
    if out.exists():
        raise ValueError(f"{out} exists: name another directory")
    path = base_of(adapter, base)
    read = _read(adapter, load_form(path, "bfloat16", option="--base", trust=trust))
    if form == "peft":
        found, kt = _to_peft(read), None
    else:
        read.config.update(lora_alpha=_alpha(read.config), use_rslora=False)
        found, kt = (_to_kt if form == "kt" else _to_per_expert)(_halved(read))
    with whole_directory(out) as part:
        (part / CONFIG).write_text(json.dumps(found.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in found.others.items()}
        save_file(tensors, part / TENSORS, {"format": "pt"})
        if kt is not None:
            save_file(kt, part / KT_TENSORS)
            _write_manifest(part, path, found.config, kt)
    return out


# ---- reading


def _read(folder: Path, model: Any) -> _Adapter:
    config = read_json(folder / CONFIG)
    if uneven := [name for name in _UNEVEN if config.get(name)]:
        raise ValueError(f"{folder}/{CONFIG} has a {uneven[0]}: adapters of one rank and one alpha can be converted")
    if config.get("use_dora"):
        raise ValueError(f"{folder}/{CONFIG} has use_dora: LoRA without magnitudes can be converted")
    if isinstance(config.get("target_modules"), str):
        raise ValueError(f"{folder}/{CONFIG} has a pattern as target_modules: a list of names can be converted")
    try:
        others = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
        kt = load_file(folder / KT_TENSORS) if (folder / KT_TENSORS).is_file() else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"the adapter in {folder} cannot be read: {one_line(error)}") from error
    if odd := [name for name in others if "lora_" in name and not _FACTOR.search(name)]:
        raise ValueError(f"the adapter in {folder} has {odd[0]}: lora_A and lora_B of linear modules can be converted")
    if kt is not None:
        _check_manifest(folder / KT_MANIFEST, config)
    found = _Adapter(config, others, {}, {})
    for name, block in _blocks(model):
        found.names[name] = names = _names_in_checkpoint(model, name)
        if kt is not None:
            pairs = [(_take(kt, f"{key}_a"), _take(kt, f"{key}_b")) for key in _kt_keys(name)]
        elif names and _lora_of(names[0], 0)[0] in others:
            pairs = [_stacked(others, projection, len(block.down_proj)) for projection in names]
        else:
            pairs = _of_peft(others, name, block)
        _check_sizes(pairs, config["r"], name, block)
        found.blocks[name] = pairs
        left = [each for each in others for projection in names if _of_an_expert(each, projection)]
        if left:
            raise ValueError(f"{folder / TENSORS} has {min(left)}, which the base has not: it is of another base")
    if kt:
        raise ValueError(f"{folder / KT_TENSORS} has {min(kt)}, which the base has not: it is of another base")
    return found


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the model, block) of every block of routed experts."""
    blocks = find_experts(model)
    for name, module in model.named_modules():
        if any(module is block for block in blocks):
            yield name, module


def _names_in_checkpoint(model: Any, block: str) -> list[str]:
    """`names` of _Adapter. They may differ from the model's own, like block_sparse_moe.experts.{}.w1 in Mixtral."""
    # transformers saves tensors under other names than the model has: each gets its own value, by which it is found
    marks = torch.arange(3.0).view(1, 3, 1)
    parts = {f"{block}.{WEIGHTS[0]}": marks[:, :2], f"{block}.{WEIGHTS[1]}": marks[:, 2:]}
    saved = revert_weight_conversion(model, parts)
    single = [name for name, tensor in saved.items() if tensor.numel() == 1 and _FIRST_EXPERT.search(name)]
    names = [_FIRST_EXPERT.sub(r".{}.\1", name) for name in sorted(single, key=lambda name: float(saved[name]))]
    return names if len(names) == len(_KINDS) else []


def _lora_of(projection: str, expert: int) -> tuple[str, str]:
    """The names of A and B of an expert's projection."""
    module = _PREFIX + projection.format(expert)
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _of_an_expert(name: str, projection: str) -> bool:
    """True for a tensor of this projection of any expert, whatever its number."""
    before, _, after = projection.partition("{}")
    return re.fullmatch(rf"{re.escape(_PREFIX + before)}\d+{re.escape(after)}\.lora_.*", name) is not None


def _stacked(tensors: dict[str, Tensor], projection: str, experts: int) -> Pair:
    pairs = [[_take(tensors, name) for name in _lora_of(projection, e)] for e in range(experts)]
    if any(a.shape != pairs[0][0].shape or b.shape != pairs[0][1].shape for a, b in pairs):
        raise ValueError(f"the adapter's LoRA of {projection} differs in size from expert to expert")
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def _of_peft(tensors: dict[str, Tensor], name: str, block: Any) -> list[Pair]:
    experts, hidden, intermediate = block.down_proj.shape
    found = {}
    for a_name, b_name in _peft_names(name):
        a, b = _take(tensors, a_name), _take(tensors, b_name)
        for kind, sizes in zip(WEIGHTS, ((hidden, 2 * intermediate), (intermediate, hidden)), strict=True):
            have = (a.shape[1], b.shape[0])
            if have in (sizes, sizes[::-1]):
                turned = have != sizes or (sizes[0] == sizes[1] and _turned_here())
                found[kind] = Factors(a, b, 1.0, turned).of_experts(experts)
    if len(found) != len(WEIGHTS):
        raise ValueError(f"the adapter's LoRA of {name} has other sizes than the base: {experts} experts of {hidden}")
    (a, b), down = found[WEIGHTS[0]], found[WEIGHTS[1]]
    return [(a, b[:, :intermediate]), (a, b[:, intermediate:]), down]


def _peft_names(block: str) -> list[tuple[str, str]]:
    """The names of A and B of gate_up_proj, which is the inner of two wrappers, and of down_proj, the outer."""
    return [
        (f"{_PREFIX}{block}{place}.lora_A.weight", f"{_PREFIX}{block}{place}.lora_B.weight")
        for place in (".base_layer", "")
    ]


def _kt_keys(block: str) -> list[str]:
    """What the names of gate, up and down begin with in kt's file."""
    number = re.search(r"\blayers\.(\d+)\.", block)
    if number is None:
        raise ValueError(f"the block {block} has no number of a layer, by which kt's format names it")
    return [f"layers.{number.group(1)}.experts.{kind}_lora" for kind in _KINDS]


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the adapter has no {name}: it takes one with LoRA on every expert's gate, up and down")
    return tensors.pop(name)


def _check_sizes(pairs: list[Pair], rank: int, name: str, block: Any) -> None:
    experts, hidden, intermediate = block.down_proj.shape
    for kind, (a, b) in zip(_KINDS, pairs, strict=True):
        inputs, outputs = (intermediate, hidden) if kind == "down" else (hidden, intermediate)
        wanted = [experts, rank, inputs], [experts, outputs, rank]
        if (list(a.shape), list(b.shape)) != wanted:
            raise ValueError(
                f"the adapter's LoRA of {kind} in {name} is A {list(a.shape)} and B {list(b.shape)}; the base and r in "
                f"{CONFIG} ask for A {wanted[0]} and B {wanted[1]}"
            )


def _check_manifest(manifest: Path, config: dict[str, Any]) -> None:
    """ValueError unless kt's manifest, which its older versions did not write, has the configuration's scaling."""
    if not manifest.is_file():
        return
    lora = read_json(manifest).get("lora") or {}
    if lora.get("rank") != config["r"] or lora.get("alpha") != _alpha(config):
        raise ValueError(
            f"{manifest} has rank {lora.get('rank')} and alpha {lora.get('alpha')}, {CONFIG} beside it {config['r']} "
            f"and {config['lora_alpha']}: both must be the same"
        )


# ---- ranks and scalings


def _alpha(config: dict[str, Any], *, times: float = 1) -> float:
    """The alpha that gives `times` the scaling by alpha / r; an int where it is one, as configurations have it."""
    alpha = times * config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    return int(alpha) if alpha == int(alpha) else float(alpha)


def _doubled(adapter: _Adapter) -> _Adapter:
    """The adapter with one A for gate and up, their two together, and zeros up to twice the rank in all else.

    The adapter itself where they are equal."""
    if all(torch.equal(gate[0], up[0]) for gate, up, _ in adapter.blocks.values()):
        return adapter
    rank, blocks = int(adapter.config["r"]), {}
    for name, (gate, up, down) in adapter.blocks.items():
        a = torch.cat([gate[0], up[0]], dim=1)
        blocks[name] = [
            (a, functional.pad(gate[1], (0, rank))),
            (a, functional.pad(up[1], (rank, 0))),
            (functional.pad(down[0], (0, 0, 0, rank)), functional.pad(down[1], (0, rank))),
        ]
    others = {
        name: functional.pad(tensor, (0, 0, 0, rank) if "lora_A" in name else (0, rank)) if "lora_" in name else tensor
        for name, tensor in adapter.others.items()
    }
    alpha = _alpha(adapter.config, times=2)
    config = {**adapter.config, "r": 2 * rank, "lora_alpha": alpha, "use_rslora": False}
    return replace(adapter, config=config, others=others, blocks=blocks)


def _halved(adapter: _Adapter) -> _Adapter:
    """The adapter that `_doubled` made this one of; the adapter itself where it is none of those."""
    rank = int(adapter.config["r"])
    half = rank // 2
    factors = {name: tensor for name, tensor in adapter.others.items() if _FACTOR.search(name)}
    zeros = [tensor[half:] if "lora_A" in name else tensor[:, half:] for name, tensor in factors.items()]
    for gate, up, down in adapter.blocks.values():
        zeros += [gate[1][..., half:], up[1][..., :half], down[0][:, half:], down[1][..., half:]]
    # a fresh adapter has B of zeros, but no A
    if rank % 2 or any(bool(tensor.any()) for tensor in zeros):
        return adapter
    blocks = {
        name: [
            (gate[0][:, :half], gate[1][..., :half]),
            (up[0][:, half:], up[1][..., half:]),
            (down[0][:, :half], down[1][..., :half]),
        ]
        for name, (gate, up, down) in adapter.blocks.items()
    }
    others = {
        name: tensor[:half] if "lora_A" in name else tensor[:, :half] if "lora_B" in name else tensor
        for name, tensor in adapter.others.items()
    }
    config = {**adapter.config, "r": half, "lora_alpha": _alpha(adapter.config, times=0.5)}
    return replace(adapter, config=config, others=others, blocks=blocks)


# ---- writing: (configuration and tensors, the tensors of kt's own file)


def _to_peft(adapter: _Adapter) -> _Adapter:
    if named := [name for projection in sorted(adapter.projections) for name in adapter.beside(projection)]:
        raise ValueError(
            f"the adapter has {named[0]} beside the routed experts: peft takes such a name for the experts', so its "
            "format cannot have both; --format per-expert can"
        )
    wide = _doubled(adapter)
    tensors = dict(wide.others)
    for name, (gate, up, down) in wide.blocks.items():
        joined = gate[0], torch.cat([gate[1], up[1]], dim=1)
        for names, (a, b) in zip(_peft_names(name), (joined, down), strict=True):
            if _turned_here():
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            # the expert's index is the slowest of A's rows, and the fastest of B's columns
            tensors[names[0]] = a.reshape(-1, a.shape[2])
            tensors[names[1]] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    config = _with_targets(wide, set(), [f"experts.{name}" for name in WEIGHTS])
    return replace(wide, config=config, others=tensors)


def _to_per_expert(adapter: _Adapter) -> tuple[_Adapter, None]:
    tensors = dict(adapter.others)
    for block, pairs in adapter.blocks.items():
        if not adapter.names[block]:
            raise ValueError(f"the base's checkpoint has the experts of {block} stacked: a single one has no name")
        for projection, pair in zip(adapter.names[block], pairs, strict=True):
            for e in range(len(pair[0])):
                for name, tensor in zip(_lora_of(projection, e), pair, strict=True):
                    # gate and up may share their A, and one file has no memory twice
                    tensors[name] = tensor[e].clone()
    return replace(adapter, config=_with_targets(adapter, adapter.projections, None), others=tensors), None


def _to_kt(adapter: _Adapter) -> tuple[_Adapter, dict[str, Tensor]]:
    kt = {
        f"{key}_{letter}": tensor.to(torch.bfloat16).clone(memory_format=torch.contiguous_format)
        for block, pairs in adapter.blocks.items()
        for key, pair in zip(_kt_keys(block), pairs, strict=True)
        for letter, tensor in zip("ab", pair, strict=True)
    }
    return replace(adapter, config=_with_targets(adapter, set(), None)), kt


def _with_targets(adapter: _Adapter, projections: set[str], parameters: list[str] | None) -> dict[str, Any]:
    """The configuration whose targets are those beside the experts, `projections` and `parameters`."""
    experts = adapter.projections
    given = adapter.config.get("target_modules") or ()
    beside = {name for name in given if (last := name.rpartition(".")[2]) not in experts or adapter.beside(last)}
    # what kt-kernel leaves to its own file, it excludes by a pattern
    return {
        **adapter.config,
        "target_modules": sorted(beside | projections),
        "target_parameters": parameters,
        "exclude_modules": None,
    }


def _write_manifest(folder: Path, base: str, config: dict[str, Any], kt: dict[str, Tensor]) -> None:
    """Write the file without which kt-kernel takes no adapter: base, rank, alpha, sizes and hashes of the others."""
    files: dict[str, Any] = {}
    for name in (CONFIG, TENSORS, KT_TENSORS):
        content = (folder / name).read_bytes()
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    shapes = {name: {"shape": list(tensor.shape), "dtype": "BF16"} for name, tensor in sorted(kt.items())}
    files[KT_TENSORS] |= {"tensor_count": len(kt), "tensors": shapes}
    manifest = {
        "version": 1,
        "status": "ready",
        "expert_weight_format": "bf16",
        "base": {"model_name_or_path": base},
        "lora": {"rank": config["r"], "alpha": float(config["lora_alpha"])},
        "artifacts": files,
    }
    (folder / KT_MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _turned_here() -> bool:
    """Whether the installed peft has the factors of stacked parameters the other way round; see Factors."""
    return tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
