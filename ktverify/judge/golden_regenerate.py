"""Regenerate the goldens, or check that they would come out the same.

New goldens are written into a staging directory and moved beside the old ones; the manifest, replaced in one step,
selects which of them count. A process that is killed at any moment leaves the old set whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from ktverify.judge.gates import budget
from ktverify.judge.golden import (
    MANIFEST,
    Entry,
    Golden,
    StoredTensor,
    full_path,
    golden_dir,
    read_entry,
    read_manifest,
    write_golden,
    write_manifest,
)
from ktverify.judge.golden_sketch import SKETCH_VERSION, Sketch, make_sketch, same_sketch
from ktverify.judge.metrics import compare, count_nonzero
from ktverify.judge.reference import forward_backward
from ktverify.judge.rounding import rounding_errors
from ktverify.spec.cases import Case, catalogue, flops, select
from ktverify.spec.generator import GENERATOR_VERSION
from ktverify.spec.inputs import inputs_sha256, make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_WEIGHTS
from ktverify.system.files import write_whole

FULL_LIMIT = 16384

# sums of fp64 in another order differ by about 1e-15; a golden that agrees to this stays, so that the last bits of
# another CPU change nothing in git
SAME_VALUES = 1e-10
# full tensors are stored in fp32: half a unit in the last of its 24 bits
SAME_FP32 = 2.0**-23
# fp32 sums of another CPU give other draws of the errors of rounding. The root mean square of n numbers in d draws is
# known to 1 / sqrt(2 n d), and two may be 7 of that apart
SAME_ROUNDING = 0.1
SAME_FEW = 5.0
# its folders are deleted, so nothing else may have such a name
_STAGING = ".ktverify-golden-staging-"
_OURS = "ours.json"  # names of files beside the folder that a regeneration made or replaces


@dataclass
class Regeneration:
    """What a regeneration found: ids of goldens left unchanged and of those written, and one line per drift."""

    unchanged: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def regenerate(
    only: str | None = None,
    *,
    directory: Path | None = None,
    check: bool = False,
    force: bool = False,
    full: bool = False,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Regeneration:
    """Compute the fp64 oracle of every row of the catalogue (or of those that the glob `only` names) and store it.

    A golden whose inputs are the same and whose values agree to 1e-10 is left as it is, unless `force`. check writes
    nothing. full also writes the whole fp64 tensors into the cache. progress(text, share of the work done) is called
    before each case. ValueError where `only` names no row, or another process regenerates the same directory.
    """
    where = directory or golden_dir()
    cases = select(only)
    if not cases:
        raise ValueError(f"no case matches {only!r}; `python -m ktverify list` prints the names")
    strangers = [case.id for case in cases if catalogue().get(case.name) != case]
    if strangers:
        raise ValueError(f"{strangers[0]} is no row of the catalogue; goldens are kept of rows only")
    result, costs, done = Regeneration(), [flops(case, backward=True) + 1e9 for case in cases], 0.0
    with contextlib.nullcontext() if check else _staging(where) as staging:
        old = read_manifest(where, missing_ok=True)
        entries = dict(old)
        if only is None:
            rows = {case.id for case in catalogue().values()}
            entries = {key: entry for key, entry in old.items() if key in rows}
            result.lines += [f"{key}: is no row of the catalogue any more" for key in old if key not in rows]
        for case, cost in zip(cases, costs, strict=True):
            progress(case.name, done / sum(costs))
            golden, tensors = compute(case)
            lines = _differs(case, old.get(case.id), golden, where)
            result.lines += [f"{case.id}: {line}" for line in lines]
            changed = bool(lines) or force
            (result.written if changed else result.unchanged).append(case.id)
            if changed and staging is not None:
                entries[case.id] = write_golden(golden, staging)
            if full and staging is not None:
                _write_full(case, tensors)
            done += cost
        progress("", 1.0)
        if staging is not None:
            _publish(where, staging, old, entries)
    return result


def compute(case: Case) -> tuple[Golden, dict[str, torch.Tensor]]:
    """The golden of `case`, and the oracle's tensors in fp64."""
    inputs = make_inputs(case)
    sha256 = inputs_sha256(inputs)
    expected = forward_backward(inputs)
    stored = {name: _stored(case, name, expected[name]) for name in ALL_TENSORS}
    return Golden(case, sha256, torch.__version__, stored, rounding_errors(inputs)), expected


def _stored(case: Case, name: str, tensor: torch.Tensor) -> StoredTensor:
    shape = tuple(tensor.shape)
    sha256 = _tensor_sha256(tensor)
    if not any(count_nonzero(part) for part in tensor):
        return StoredTensor(shape, "zero", sha256, None)
    if case.exact:
        return StoredTensor(shape, "full", sha256, tensor.to(_output_dtype(case, name)))
    if tensor.numel() <= FULL_LIMIT or not bool(torch.isfinite(tensor).all()):
        return StoredTensor(shape, "full", sha256, tensor.float())
    return StoredTensor(shape, "sketch", sha256, make_sketch(tensor, f"{case.name} {name}"))


def _output_dtype(case: Case, name: str) -> torch.dtype:
    fp32 = name == GRAD_WEIGHTS or ("_lora_" in name and case.lora_dtype == "float32")
    return torch.float32 if fp32 else torch.bfloat16


def _differs(case: Case, entry: Entry | None, new: Golden, where: Path) -> list[str]:
    """One line for each difference of the stored golden from the new one; empty where the stored one may stay."""
    if entry is None:
        return ["has no golden"]
    if entry["case"] != case.spec:
        return [f"was {entry['case']}, is {case.spec}"]
    if entry["generator"] != GENERATOR_VERSION or entry["sketch"] != SKETCH_VERSION:
        return [f"was made by generator {entry['generator']} and sketch {entry['sketch']}"]
    if entry["inputs_sha256"] != new.inputs_sha256:
        return [f"inputs have SHA-256 {new.inputs_sha256[:12]}, the golden was made of {entry['inputs_sha256'][:12]}"]
    try:
        old = read_entry(case, entry, where)
    except ValueError as error:
        return [str(error)]
    lines = []
    for name in ALL_TENSORS:
        line = _tensor_differs(old.tensors[name], new.tensors[name])
        if line:
            lines.append(f"{name} {line}")
        was, found = budget(old.rounding[name]), budget(new.rounding[name])
        numbers = min(each.rounding[name].numbers * each.rounding[name].draws for each in (old, new))
        if found != was and not abs(found - was) <= (SAME_ROUNDING + SAME_FEW / math.sqrt(numbers)) * was:
            lines.append(f"{name}: the budget is {found:.3e}, that of the golden {was:.3e}")
    return lines


def _tensor_differs(old: StoredTensor, new: StoredTensor) -> str:
    if (old.shape, old.kind) != (new.shape, new.kind):
        return f"is {new.kind} {list(new.shape)}, the golden is {old.kind} {list(old.shape)}"
    if isinstance(old.value, Sketch) and isinstance(new.value, Sketch):
        return "" if same_sketch(new.value, old.value, SAME_VALUES) else "differs from its sketch"
    if isinstance(old.value, torch.Tensor) and isinstance(new.value, torch.Tensor):
        if old.value.dtype != new.value.dtype:
            return f"is kept as {new.value.dtype}, the golden as {old.value.dtype}"
        difference = compare(new.value, old.value)
        limit = SAME_FP32 if old.value.dtype == torch.float32 else 0.0
        broken = difference.non_finite + difference.missing_non_finite
        if difference.rel_l2 > limit or broken:
            return f"differs by rel_l2 {difference.rel_l2:.1e} at {list(difference.worst_index)}"
    return ""


def _publish(where: Path, staging: Path, old: dict[str, Entry], entries: dict[str, Entry]) -> None:
    """Move the new files, replace the manifest in one step, then delete the files that it leaves out: of the old
    manifest's, and of this regeneration's. Any other file in `where` stays, whatever its name.
    """
    new = sorted(staging.iterdir())
    ours = {entry["file"] for entry in old.values()} | {path.name for path in new}
    # for the next regeneration, should this process be killed before the last deletion
    write_whole(staging / _OURS, json.dumps(sorted(ours)))
    for path in new:
        os.replace(path, where / path.name)
    order = [case.id for case in catalogue().values()]
    known = [key for key in order if key in entries] + sorted(set(entries) - set(order))
    write_manifest(where, {key: entries[key] for key in known})
    _delete_unnamed(where, ours)


def _delete_unnamed(where: Path, ours: Iterable[str]) -> None:
    """Delete those files among `ours` that the manifest in `where` does not name."""
    named = {entry["file"] for entry in read_manifest(where, missing_ok=True).values()}
    for name in set(ours) - named:
        (where / name).unlink(missing_ok=True)


def _write_full(case: Case, tensors: dict[str, torch.Tensor]) -> None:
    path = full_path(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        # gigabytes: written tensor by tensor, not through one byte string as write_whole would
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _staging(where: Path) -> Iterator[Path]:
    """A directory in `where`, for one process at a time; deletes what killed processes left of theirs.

    ValueError while another process has one.
    """
    where.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(where / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process regenerates the goldens in {where}") from None
    with lock:
        for left in where.glob(f"{_STAGING}*"):
            if (left / _OURS).is_file():
                _delete_unnamed(where, json.loads((left / _OURS).read_text(encoding="utf-8")))
            shutil.rmtree(left, ignore_errors=True)
        for left in where.glob(f".{MANIFEST}.*.part"):
            left.unlink()
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=where))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of the fp64 values, row by row. A row of zeros is hashed as "0": idle experts' pages are not touched."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for part in tensor:
        if count_nonzero(part):
            array: Any = part.contiguous().reshape(-1).numpy()
            digest.update(memoryview(array).cast("B"))
        else:
            digest.update(b"0")
    return digest.hexdigest()
