"""export-merged: a checkpoint with an adapter added to it, and everything else as it was, byte for byte.

transformers and peft compute the tensors that the adapter changes and name them as the checkpoint does. Only these are
replaced: tensors that the model does not load, like a layer that predicts further tokens, stay in the checkpoint.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open

from ktverify.engines.checkpoint_files import INDEX
from ktverify.engines.quantise import INT4_GROUPS
from ktverify.system.text import read_json
from ktverify.training.adapter import base_of, load_adapter
from ktverify.training.headers import header_of
from ktverify.training.output_directory import copy_others, whole_directory
from ktverify.training.pretrained import load_form, load_model, of_hub
from ktverify.training.quantise import check_format, quantise_checkpoint
from ktverify.training.quantised import Quantisation, quantisation_of, write_dequantised

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# names of tensors that an adapter may change, in checkpoints
_PROJECTIONS = re.compile(r"(proj|\.w[123])(\.weight)?$")


def export_merged(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    trust: bool = False,
    to: str | None = None,
    group: int = INT4_GROUPS[0],
) -> Path:
    """Write base + adapter to `out`, whole or not at all, and return `out`.

    base: the base model's path, by default the one that the adapter names. dtype: of the tensors that the adapter
    changes, by default that of the checkpoint; bfloat16 rounds the sum once. Other tensors and files are copied; the
    weights of a quantised base are written as bf16, and a line on stderr says so. to: the routed experts become codes
    of int8, int4 (with this group) or fp8, as quantise_checkpoint makes them of the sum in bf16; a line on stderr says
    what they lose. The bf16 files are beside the codes until these are written.
    ValueError where `out` exists, `adapter` is none, or the base has no safetensors files or is quantised in a way that
    is not read; and as quantise_checkpoint.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name another directory")
    if to is not None:
        check_format(to, group)
        if dtype not in (None, "bfloat16"):
            raise ValueError(f"--dtype is {dtype}; with --to it takes bfloat16, of which the codes are made")
    with whole_directory(out) as part:
        if to is None:
            _merge(adapter, part, out, base=base, dtype=dtype, trust=trust)
            return out
        plain, coded = part / ".plain", part / ".coded"
        plain.mkdir()
        _merge(adapter, plain, out, base=base, dtype="bfloat16", trust=trust, codes=True)
        written = quantise_checkpoint(plain, coded, to, group=group)
        shutil.rmtree(plain)
        for each in coded.iterdir():
            each.rename(part / each.name)
        coded.rmdir()
    print(f"{out} has its routed experts in {to}: {written.loss()}", file=sys.stderr)
    return out


def _merge(
    adapter: Path, part: Path, out: Path, *, base: str | None, dtype: str | None, trust: bool, codes: bool = False
) -> None:
    """Write base + adapter to the empty directory `part`. out, codes: what a line says of a quantised base."""
    path = base_of(adapter, base)
    if not Path(path).is_dir():
        load_form(path, "bfloat16", option="--base", trust=trust)  # refuses what is neither here nor on the hub
    folder = Path(path) if Path(path).is_dir() else of_hub(path)
    about = _quantisation_of(folder)
    loaded = dtype or ("bfloat16" if about else _dtype_of(_headers(folder)))
    model = load_model(path, loaded, option="--base", trust=trust)
    adapted = load_adapter(model, adapter)
    names = _changed_by(adapted)
    merged = adapted.merge_and_unload()
    if about:
        if not codes:
            print(f"--base {path} is quantised: {out} is written in bf16; --to makes codes", file=sys.stderr)
        write_dequantised(folder, about, part / ".base")
        folder = part / ".base"
    headers = _headers(folder)
    state = merged.state_dict()
    merged.save_pretrained(part / ".merged", state_dict={name: state[name] for name in names})
    changed = {name: file for file in (part / ".merged").glob("*.safetensors") for name in header_of(file)}
    there = {name for header in headers.values() for name in header}
    if lost := sorted(changed.keys() - there):
        raise ValueError(f"--base {path} has no {lost[0]}, which the adapter changes ({len(lost)} are missing)")
    for file, header in headers.items():
        _write(file, header, part / file.name, changed, _DTYPES_BY_NAME.get(dtype or ""))
        if about:
            file.unlink()
    copy_others(folder, part, headers)
    shutil.rmtree(part / ".merged")
    shutil.rmtree(part / ".base", ignore_errors=True)
    if dtype:
        _note_dtype(part, dtype)


_DTYPES_BY_NAME = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def _quantisation_of(folder: Path) -> Quantisation | None:
    config = folder / "config.json"
    if not config.is_file():
        return None
    about = {"quantization_config": read_json(config).get("quantization_config"), "name_or_path": str(folder)}
    return quantisation_of(SimpleNamespace(**about))


def _headers(folder: Path) -> dict[Path, dict[str, Any]]:
    """The header of each safetensors file. ValueError without one, or for quantised weights."""
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("quantization_config"):
        raise ValueError(f"--base {folder} is quantised: an adapter cannot be merged into it; name one that is not")
    found = {file: header_of(file) for file in sorted(folder.glob("*.safetensors"))}
    if not found:
        raise ValueError(f"--base {folder} has no *.safetensors, which an adapter is merged into; convert it first")
    return found


def _dtype_of(headers: Mapping[Path, dict[str, Any]]) -> str:
    """The dtype that holds every tensor which an adapter may change."""
    counts: Counter[str] = Counter()
    for header in headers.values():
        for name, about in header.items():
            if about["dtype"] in _DTYPES and _PROJECTIONS.search(name):
                counts[about["dtype"]] += math.prod(about["shape"])
    wide = "F32" if counts["F32"] or len(counts) > 1 else next(iter(counts), "BF16")
    return {name: dtype for dtype, name in _DTYPES_BY_NAME.items()}[wide]


def _changed_by(adapted: PeftModel) -> list[str]:
    """The parameters of the base model that merging changes, by their names in it."""
    found: set[str] = set()
    for name, module in adapted.named_modules():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, LoraLayer):
            found.add(f"{plain}.{getattr(module, 'parameter_name', 'weight')}")
            if any(getattr(module, "lora_bias", {}).values()):
                found.add(f"{plain}.bias")
        elif isinstance(module, ModulesToSaveWrapper):
            found.update(f"{plain}.{inner}" for inner, _ in module.original_module.named_parameters())
    return sorted(found)


def _write(source: Path, header: dict[str, Any], target: Path, changed: Mapping[str, Path], dtype: str | None) -> None:
    """Copy a safetensors file with the tensors of `changed`, by the file that has each, in their place."""
    shutil.copyfile(source, target)
    ours = [name for name in header if name in changed]
    if not ours:
        return
    wanted = {name: {**header[name], "dtype": dtype or header[name]["dtype"]} for name in ours}
    with source.open("rb") as old, target.open("r+b") as new:
        (size,) = struct.unpack("<Q", old.read(8))
        text = old.read(size)
        begin = 8 + size
        if any(wanted[name] != header[name] for name in ours):
            whole = json.loads(text)
            at = 0
            for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
                about = {**header[name], **wanted.get(name, {})}
                first, end = header[name]["data_offsets"]
                count = _bytes_of(about) if name in wanted else end - first
                whole[name] = {**about, "data_offsets": [at, at + count]}
                at += count
            text = json.dumps(whole, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            new.truncate(0)
            new.write(struct.pack("<Q", len(text)) + text)
            for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
                first, end = header[name]["data_offsets"]
                if name in wanted:
                    new.write(_merged(changed[name], name, wanted[name], source))
                    continue
                old.seek(begin + first)
                while first < end:
                    first += new.write(old.read(min(1 << 24, end - first)))
            return
        for name in ours:
            new.seek(begin + header[name]["data_offsets"][0])
            new.write(_merged(changed[name], name, wanted[name], source))


def _bytes_of(about: dict[str, Any]) -> int:
    return int(math.prod(about["shape"])) * _DTYPES[about["dtype"]].itemsize


def _merged(file: Path, name: str, about: dict[str, Any], source: Path) -> bytes:
    """The bytes of a merged tensor in the dtype of `about`. ValueError where it is not the checkpoint's shape."""
    with safe_open(file, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    if about["dtype"] not in _DTYPES or list(tensor.shape) != about["shape"]:
        raise ValueError(
            f"{source}: {name} is {about['dtype']} {about['shape']}; an adapter of {list(tensor.shape)} in "
            f"{' or '.join(_DTYPES)} can be merged"
        )
    found: bytes = tensor.to(_DTYPES[about["dtype"]]).contiguous().view(torch.uint8).numpy().tobytes()
    return found


def _note_dtype(folder: Path, dtype: str) -> None:
    """Let the configuration and the index say what was written, where they say something else."""
    config = folder / "config.json"
    document = read_json(config)
    keys = [key for key in ("dtype", "torch_dtype") if document.get(key, dtype) != dtype]
    if keys:
        config.write_text(json.dumps({**document, **dict.fromkeys(keys, dtype)}, indent=2) + "\n", encoding="utf-8")
    index = folder / INDEX
    if index.is_file():
        document = read_json(index)
        size = sum(
            about["data_offsets"][1] - about["data_offsets"][0]
            for file in folder.glob("*.safetensors")
            for about in header_of(file).values()
        )
        if document.get("metadata", {}).get("total_size", size) != size:
            document["metadata"]["total_size"] = size
            index.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
