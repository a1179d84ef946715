"""quantise: a bf16 checkpoint with the routed experts of its decoder as codes, and everything else byte for byte.

Codes are those of docs/contract.md, "Quantised base weights"; names and config.json are those of published checkpoints:
DeepSeek-V3's for fp8, compressed-tensors' pack-quantized for int8 and int4.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ktverify.engines.checkpoint_files import INDEX, read_index
from ktverify.engines.native.checkpoint import FURTHER_TOKENS, OTHER_TOWERS
from ktverify.engines.quantise import FP8_BLOCK, INT4_GROUPS, MADE, codes_of
from ktverify.engines.quantised import dequantised
from ktverify.engines.quantization_config import QuantizationConfig
from ktverify.system.limits import format_bytes
from ktverify.system.text import read_json
from ktverify.training.headers import header_of
from ktverify.training.output_directory import copy_others, whole_directory

_EXPERT = re.compile(
    r"((?:.*\.)?layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.\d+\.(?:gate_proj|up_proj|down_proj|w[123])\.weight"
)
_STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj|gate_proj|up_proj)(\.weight)?$")
_NUMBERS = re.compile(r"\.\d+(?=\.)")
_CHUNK = 1 << 24  # bytes that are copied at once


@dataclass
class Written:
    """What was written: matrices and their bytes as codes, and the kinds of tensors that were left, with theirs.

    largest: the largest change of a weight, over the largest weight of its matrix."""

    folder: Path
    matrices: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    left: dict[str, int] = field(default_factory=dict)
    cut_blocks: bool = False
    largest: float = 0.0
    _squares: tuple[float, float] = 0.0, 0.0  # sums over all matrices: of changes, of weights

    def add_change(self, weight: torch.Tensor, read: torch.Tensor) -> None:
        """Count a matrix [N, K] and the weights that its codes stand for."""
        of, change = weight.float(), read.float().sub_(weight)
        self.largest = max(self.largest, float(change.abs().max() / of.abs().max().clamp(min=1e-45)))
        squares = float(change.square_().sum(dtype=torch.float64)), float(of.square_().sum(dtype=torch.float64))
        self._squares = self._squares[0] + squares[0], self._squares[1] + squares[1]

    def loss(self) -> str:
        """What the codes change, as a line: root mean squares over all matrices, and the largest change."""
        change, of = self._squares
        rms = math.sqrt(change / of) if of else 0.0
        return (
            f"the codes change the experts' weights by {100 * rms:.2g} % in the root mean square, and one by at most "
            f"{100 * self.largest:.2g} % of the largest in its matrix"
        )


def quantise_checkpoint(
    checkpoint: Path,
    out: Path,
    format: str,
    *,
    group: int = INT4_GROUPS[0],
    say: Callable[[str, float], None] = lambda name, share: None,
) -> Written:
    """Write `checkpoint` to `out`, whole or not at all, with the routed experts in `format`: int8, int4 or fp8.

    group: columns that share a scale of int4. say: called with a file's name and the share that is done, 0 to 1. In
    memory are one matrix and its codes. Layers that predict further tokens, and towers that are not the decoder, stay.
    ValueError where `out` exists, or the checkpoint is quantised, has no routed experts that are bf16 matrices, or one
    with a NaN or Inf; OSError with both sizes where the file system has no room.
    """
    check_format(format, group)
    if out.exists():
        raise ValueError(f"{out} exists: name another directory")
    plan = _Plan(checkpoint, format, group if format == "int4" else MADE[format])
    plan.require_room(out)
    found = Written(out, cut_blocks=format == "fp8" and plan.cuts_blocks())
    whole, done = sum(plan.size(file) for file in plan.headers), 0
    with whole_directory(out) as part:
        for file, header in plan.headers.items():
            say(file.name, done / whole)
            with file.open("rb") as source, (part / file.name).open("wb") as target:
                for more in plan.write(file, header, source, target, found):
                    say(file.name, (done + more) / whole)
                target.flush()
                os.fsync(target.fileno())
            done += plan.size(file)
        copy_others(checkpoint, part, plan.headers)
        plan.write_config(part)
        plan.write_index(part)
    return found


def check_format(format: str, group: int) -> None:
    """ValueError for a format that no codes are made of, and for another group of int4."""
    if format not in MADE:
        raise ValueError(f"--to is {format!r}; it takes {', '.join(MADE)}")
    if group not in INT4_GROUPS:
        raise ValueError(f"--group is {group}; it takes {' or '.join(map(str, INT4_GROUPS))}")


class _Plan:
    """Which tensors become codes, and what the new files contain."""

    def __init__(self, checkpoint: Path, format: str, group: int) -> None:
        self.checkpoint, self.format, self.group = checkpoint, format, group
        config = checkpoint / "config.json"
        if not config.is_file():
            raise ValueError(f"{checkpoint} has no config.json; it takes a model's directory")
        if QuantizationConfig.beside(checkpoint).about:
            raise ValueError(f"{checkpoint} is quantised already; it takes a checkpoint in bf16")
        index = checkpoint / INDEX
        listed = {checkpoint / file for file in read_index(index).values()} if index.is_file() else None
        files = sorted(checkpoint.glob("*.safetensors") if listed is None else listed)
        if missing := next((file for file in files if not file.is_file()), None):
            raise ValueError(f"{index} names {missing.name}, which is not there")
        self.headers = {file: header_of(file) for file in files}
        names = {name: (file, about) for file, header in self.headers.items() for name, about in header.items()}
        self.experts = self._experts(names)
        if not self.experts:
            stacked = next((name for name in names if _STACKED.search(name)), "")
            why = f"; {stacked} has all experts of a layer, it takes one tensor for each" if stacked else ""
            raise ValueError(f"{checkpoint} has no routed experts in *.safetensors{why}")

    def _experts(self, names: Mapping[str, tuple[Path, dict[str, Any]]]) -> set[str]:
        further = re.compile(rf"((?:.*\.)?layers\.\d+\.)(?:{'|'.join(map(re.escape, FURTHER_TOKENS))})")
        ahead = {match[1] for name in names if (match := further.match(name))}
        found = set()
        for name, (file, about) in names.items():
            match = _EXPERT.fullmatch(name)
            if not match or match[1] in ahead or OTHER_TOWERS.search(match[1].partition("layers.")[0]):
                continue
            if about["dtype"] != "BF16" or len(about["shape"]) != 2:
                raise ValueError(f"{file}: {name} is {about['dtype']} {about['shape']}; it takes a matrix in BF16")
            # four codes of int8 are in an int32
            if about["shape"][1] % (divides := {"int4": self.group, "int8": 4}.get(self.format, 1)):
                raise ValueError(
                    f"{file}: {name} has rows of {about['shape'][1]} weights; --to {self.format} takes multiples of "
                    f"{divides}"
                )
            found.add(name)
        return found

    def cuts_blocks(self) -> bool:
        """Whether a block at an edge has fewer than 128 × 128 weights, beside whole ones."""
        shapes = (header[name]["shape"] for header in self.headers.values() for name in header if name in self.experts)
        return any(size > FP8_BLOCK and size % FP8_BLOCK for shape in shapes for size in shape)

    def size(self, file: Path) -> int:
        """Bytes of the tensors of a file as it is."""
        return sum(about["data_offsets"][1] - about["data_offsets"][0] for about in self.headers[file].values())

    def require_room(self, out: Path) -> None:
        parent = next(path for path in out.absolute().parents if path.exists())
        others = (file for file in self.checkpoint.rglob("*") if file.is_file() and file not in self.headers)
        needs = sum(file.stat().st_size for file in others)
        needs += sum(end for file in self.headers for _, _, end in self.entries(self.headers[file]))
        if needs > (there := shutil.disk_usage(parent).free):
            raise OSError(f"{out} needs {format_bytes(needs)}, and {parent} has {format_bytes(there)} free")

    def entries(self, header: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], int]]:
        """(name, dtype and shape, bytes) of each tensor of a new file, in the order of the old file's data."""
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            about = header[name]
            if name not in self.experts:
                yield name, about, about["data_offsets"][1] - about["data_offsets"][0]
                continue
            rows, columns = about["shape"]
            stem = name.removesuffix("weight")
            if self.format == "fp8":
                blocks = [-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)]
                made = [("weight", "F8_E4M3", [rows, columns], 1), ("weight_scale_inv", "F32", blocks, 4)]
            else:
                int4 = self.format == "int4"
                made = [("weight_packed", "I32", [rows, columns // (8 if int4 else 4)], 4)]
                scales = ("BF16", [rows, columns // self.group], 2) if int4 else ("F32", [rows, 1], 4)
                made += [("weight_scale", *scales), ("weight_shape", "I64", [2], 8)]
            for word, dtype, shape, itemsize in made:
                yield f"{stem}{word}", {"dtype": dtype, "shape": shape}, math.prod(shape) * itemsize

    def write(
        self, file: Path, header: Mapping[str, dict[str, Any]], source: BinaryIO, target: BinaryIO, found: Written
    ) -> Iterator[int]:
        """Write the new file, tensor by tensor; yields the bytes of the old one that are done."""
        new: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, about, count in self.entries(header):
            new[name] = {"dtype": about["dtype"], "shape": about["shape"], "data_offsets": [at, at + count]}
            at += count
        text = json.dumps(new, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(struct.pack("<Q", len(text)) + text)
        (length,) = struct.unpack("<Q", source.read(8))
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            first, end = header[name]["data_offsets"]
            source.seek(8 + length + first)
            if name in self.experts:
                data = bytearray(end - first)
                if source.readinto(data) != len(data):  # type: ignore[attr-defined]
                    raise ValueError(f"{file} is cut short: {name} ends beyond it")
                weight = torch.frombuffer(data, dtype=torch.bfloat16).view(header[name]["shape"])
                codes, scales = self._codes(file, name, weight)
                found.add_change(weight, dequantised(self.format, self.group, codes, scales, None))
                for tensor in self._stored(weight, codes, scales):
                    found.bytes_after += target.write(tensor.view(torch.uint8).numpy().tobytes())
                found.matrices += 1
                found.bytes_before += end - first
            else:
                kind = _NUMBERS.sub("", name)
                found.left[kind] = found.left.get(kind, 0) + end - first
                left = end - first
                while left:
                    data = bytearray(source.read(min(_CHUNK, left)))
                    if not data:
                        raise ValueError(f"{file} is cut short: {name} ends beyond it")
                    left -= target.write(data)
            yield end

    def _codes(self, file: Path, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = codes_of(weight, self.format, self.group)
        if not bool(scales.isfinite().all()):
            row, column = (int(i) for i in (~weight.isfinite()).nonzero()[0])
            value = float(weight[row, column])
            raise ValueError(f"{file}: {name}: [{row}, {column}] is {value}; it takes finite weights")
        return codes, scales

    def _stored(self, weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of `entries`, for one matrix."""
        if self.format == "fp8":
            return [codes, scales]
        if self.format == "int8":  # bytes q + 128
            codes = codes.view(torch.uint8) ^ 0x80
        return [codes, scales, torch.tensor(weight.shape)]

    def write_config(self, folder: Path) -> None:
        """config.json with a quantization_config that names what is left."""
        modules = {
            name.removesuffix(".weight")
            for header in self.headers.values()
            for name, about in header.items()
            if name not in self.experts and name.endswith(".weight") and len(about["shape"]) == 2
        }
        left = sorted(modules)
        if self.format == "fp8":
            about: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
            about |= {"weight_block_size": [FP8_BLOCK, FP8_BLOCK], "modules_to_not_convert": left}
        else:
            int4 = self.format == "int4"
            weights: dict[str, Any] = {"num_bits": 4 if int4 else 8, "type": "int", "symmetric": True, "dynamic": False}
            weights |= {"strategy": "group" if int4 else "channel", "group_size": self.group if int4 else None}
            weights |= {"actorder": None, "block_structure": None}
            scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
            form = {"format": "pack-quantized"}
            about = {"quant_method": "compressed-tensors", **form, "quantization_status": "compressed"}
            about |= {"config_groups": {"group_0": scheme | form}, "ignore": left}
        config = folder / "config.json"
        document = {**read_json(config), "quantization_config": about}
        config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def write_index(self, folder: Path) -> None:
        index = folder / INDEX
        if not index.is_file():
            return
        document, size, files = read_json(index), 0, {}
        for file, header in self.headers.items():
            for name, _, count in self.entries(header):
                files[name] = file.name
                size += count
        document |= {"metadata": {**document.get("metadata", {}), "total_size": size}, "weight_map": files}
        index.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
