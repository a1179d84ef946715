"""Checkpoints with quantised weights: their tensors, dequantised as they are read; experts may stay in the files.

Formats are those of engines/weight_files.py. transformers reads such files as well, but takes blocks of FP8 that are
cut off at an edge for smaller ones of equal size, and needs further packages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ktverify.engines.checkpoint_files import INDEX, Checkpoint
from ktverify.engines.native.checkpoint import FAMILIES
from ktverify.engines.quantised import check_values
from ktverify.engines.quantization_config import (
    COMPRESSED,
    FP8,
    QuantizationConfig,
    check_quantization_config,
    methods_of,
)
from ktverify.engines.weight_files import (
    LAYOUTS,
    StoredMatrix,
    matrix_of,
    name_of,
    stored_matrix,
)
from ktverify.system.text import read_json
from ktverify.training.output_directory import copy_others

# compressed-tensors' format -> bits of its integers
_BITS = {"pack-quantized": (4, 8), "int-quantized": (8,)}
_EXPERT = re.compile(
    "|".join(
        re.escape(pattern).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
        for names in FAMILIES.values()
        for pattern in names.values()
    )
)


@dataclass(frozen=True)
class Quantisation:
    """What config.json says of quantised weights. backend: the kt_backend that keeps experts as codes. fp8_block: rows
    and columns that share a scale."""

    format: str
    backend: str
    fp8_block: tuple[int, int] = (128, 128)


def quantisation_of(config: Any) -> Quantisation | None:
    """Of a model's configuration; None where its weights are not quantised, or in a way that transformers reads itself.

    ValueError for a form of FP8 or compressed-tensors that is not read, and as check_quantization_config."""
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    where = f"{file}: quantization_config" if (file := _file_of(config)) else "its quantization_config"
    about = check_quantization_config(about.to_dict() if hasattr(about, "to_dict") else about, where)
    method = about.get("quant_method")
    if method is None and not (about.get("load_in_4bit") or about.get("load_in_8bit")):
        raise ValueError(f"{where} has no quant_method; it takes a string, as {FP8!r}")
    if method == FP8:
        if (size := about.get("weight_block_size")) is None:
            raise ValueError(f"its FP8 has weight_block_size {size!r}; it takes the rows and columns of a block")
        return Quantisation("FP8", "AMXFP8", (size[0], size[1]))
    if method == COMPRESSED:
        bits = _integers(about)
        return Quantisation(f"INT{bits}", f"AMXInt{bits}")
    return None


def _file_of(config: Any) -> Path | None:
    """The config.json that a configuration was read from, None where it is not known here."""
    path = getattr(config, "name_or_path", None)
    file = Path(path) / "config.json" if path and isinstance(path, str) else None
    return file if file and file.is_file() else None


def _integers(about: Mapping[str, Any]) -> int:
    """The bits of compressed-tensors' integers. ValueError for another form."""
    form, groups = str(about.get("format")), about.get("config_groups")
    found = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    for weights in found or [{}]:
        if weights.get("type") != "int" or weights.get("num_bits") not in _BITS.get(form, ()):
            takes = ", ".join(f"{name} of {' or '.join(map(str, bits))} bits" for name, bits in _BITS.items())
            raise ValueError(
                f"its compressed-tensors are {form} with {weights.get('num_bits')} bits of type {weights.get('type')}; "
                f"integers are read: {takes}"
            )
    return int(found[0]["num_bits"])


def require_no_codes(folder: Path) -> None:
    """ValueError for a folder whose files have codes that are read here, where config.json says nothing of them or
    names another method: transformers would take the codes for weights. Only headers are read."""
    if not any(folder.glob("*.safetensors")):
        return
    checkpoint, config = Checkpoint(folder, "model"), QuantizationConfig.beside(folder)
    scales = tuple(layout.scales.removeprefix("weight") for layout in LAYOUTS.values() if layout.scales)
    if not any(name.endswith(scales) for name in checkpoint.files_of):
        return
    for name in checkpoint.files_of:
        found = matrix_of(checkpoint.lookup, name)
        if found is None or name_of(found[0], LAYOUTS[found[1]].scales) not in checkpoint:
            continue
        at = checkpoint.lookup(name)
        where, format = f"{at[0] if at else folder}: {name}", found[1]
        config.require_method(where, format)
        if not config.about:
            raise ValueError(
                f"{where} is {format}, and {config.file} has no quantization_config; {format} takes quant_method "
                f"{methods_of(format)}"
            )


@dataclass
class ModelTensors:
    """The tensors of a checkpoint by the names that a model has for them, each read by [...]; codes as float32.

    files: where each is. problems: what was wrong with values, as transformers would not say it."""

    of: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    problems: list[Exception] = field(default_factory=list)

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.get_shape()) for name, tensor in self.of.items()}


def tensors_in(
    checkpoint: Checkpoint, about: Quantisation | None, outside: Mapping[str, torch.Size], dtype: torch.dtype
) -> ModelTensors:
    """outside: shapes of the stacked experts that are not read, by the model's names; each is a zero, expanded.

    Only headers are read here. ValueError or TypeError for a tensor that is missing or has another dtype or shape than
    its format; see stored_matrix."""
    found, parts, plain = ModelTensors(), set[str](), {}
    config = QuantizationConfig.beside(checkpoint.path)
    fp8_block = about.fp8_block if about else (128, 128)
    for name in checkpoint.files_of:
        at = checkpoint.lookup(name)
        if at is None or (outside and _EXPERT.search(name)):
            continue
        if (coded := matrix_of(checkpoint.lookup, name)) is None:
            plain[name], found.files[name] = at[1], at[0]
            continue
        stem, format = coded
        found.files[stem] = at[0]
        matrix = stored_matrix(checkpoint.lookup, stem, format, checkpoint.where, fp8_block=fp8_block)
        config.require(stem, matrix)
        found.of[stem] = _Dequantised(matrix, found.problems)
        parts.update(matrix.tensors)
    found.of |= {name: tensor for name, tensor in plain.items() if name not in parts}
    found.of |= {name: _Outside(shape, dtype) for name, shape in outside.items()}
    return found


@dataclass(frozen=True)
class _Dequantised:
    """A weight that transformers reads like a slice of a file."""

    matrix: StoredMatrix
    problems: list[Exception]

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        return list(self.matrix.shape)

    def __getitem__(self, part: Any) -> torch.Tensor:
        try:
            check_values(self.matrix.format, self.matrix.where, *self.matrix.values())
        except ValueError as error:
            self.problems.append(error)
            raise
        whole = self.matrix.dequantised()
        found: torch.Tensor = whole[part]
        return found


@dataclass(frozen=True)
class _Outside:
    """A parameter that the model does not hold: one zero in memory, in the parameter's shape."""

    shape: torch.Size
    dtype: torch.dtype

    def get_dtype(self) -> str:
        return {torch.bfloat16: "BF16", torch.float16: "F16"}.get(self.dtype, "F32")

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, part: Any) -> torch.Tensor:
        return torch.zeros(1, dtype=self.dtype, device="cpu").expand(self.shape)[part]


def write_dequantised(folder: Path, about: Quantisation, out: Path) -> None:
    """Write the checkpoint in `folder` to `out` with bf16 in the place of codes, without scales, file by file."""
    found = tensors_in(Checkpoint(folder, "--base"), about, {}, torch.bfloat16)
    out.mkdir()
    size, listed = 0, {}
    for file in sorted(set(found.files.values())):
        part = {name: tensor[...] for name, tensor in found.of.items() if found.files[name] == file}
        part = {
            name: tensor.to(torch.bfloat16) if isinstance(found.of[name], _Dequantised) else tensor
            for name, tensor in part.items()
        }
        save_file(part, out / file.name, {"format": "pt"})
        size += sum(tensor.nbytes for tensor in part.values())
        listed.update(dict.fromkeys(part, file.name))
    copy_others(folder, out, set(folder.glob("*.safetensors")))
    if (out / INDEX).is_file():
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": listed}, indent=2) + "\n")
    config = read_json(out / "config.json")
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
