"""Goldens on disk: reading, comparing, making anew.

golden/manifest.json tells, per case: its sizes, the generator's version, torch's, the SHA-256 of the inputs, and per
tensor the shape, how it is kept, the SHA-256 of the oracle's values and the plain bf16 peer's error.
golden/NAME.HASH.safetensors holds the values; HASH is of the file's own content, so a new golden never overwrites an
old one: the manifest, replaced in one step, decides which of them counts. A process killed at any moment leaves the old
set whole.

How a tensor is kept: `full` (up to 16384 elements in fp32, or any size in the output's own dtype where the case is
exact), `sketch` (larger; see sketch.py), `zero` (all zero, or no element).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_file

from ktverify.errors import NoGolden
from ktverify.judge.bf16_baseline import peer_error
from ktverify.judge.golden_sketch import SKETCH_VERSION, Sketch, compare_sketch, make_sketch, same_sketch
from ktverify.judge.metrics import Difference, compare, count_nonzero
from ktverify.judge.reference import forward_backward
from ktverify.spec.cases import Case, catalogue, flops, select, tensors_of
from ktverify.spec.generator import GENERATOR_VERSION
from ktverify.spec.inputs import inputs_sha256, make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_WEIGHTS
from ktverify.system.files import write_whole
from ktverify.system.paths import ROOT

MANIFEST = "manifest.json"
FORMAT = 1
FULL_LIMIT = 16384
_ENVIRONMENT = "KTVERIFY_GOLDEN_DIR"

# sums of fp64 in another order differ by some 1e-15; a golden that agrees this well is kept, bytes and all, so that
# another CPU's last bits change nothing in git
SAME_VALUES = 1e-10
# full tensors are kept in fp32: half a unit in its last of 24 bits
SAME_FP32 = 2.0**-23
# the peer's error is a measurement: bf16 products of another CPU round a few elements the other way
SAME_PEER = 0.25
_PEER_FLOOR = 2.0**-9

Kind = Literal["full", "sketch", "zero"]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Kept:
    """One tensor: `shape` and how it is kept; value: the tensor (fp32 or the output's dtype), a Sketch, or None."""

    shape: tuple[int, ...]
    kind: Kind
    sha256: str
    value: torch.Tensor | Sketch | None


@dataclass(frozen=True)
class Golden:
    """The oracle's answer to one case, as far as it is kept. peer: rel_l2 of the plain bf16 peer, by tensor."""

    case: Case
    inputs_sha256: str
    torch_version: str
    tensors: dict[str, Kept]
    peer: dict[str, float]

    def compare(self, name: str, actual: torch.Tensor) -> Difference:
        """The Difference of `actual` from the golden tensor `name`; estimated where only a sketch is kept.

        KeyError for an unknown name, ValueError for another shape.
        """
        kept = self.tensors[name]
        if isinstance(kept.value, Sketch):
            return compare_sketch(kept.value, actual)
        if kept.value is None:
            # one zero, seen as the whole tensor: no memory for what holds nothing
            return compare(actual, torch.zeros(1, dtype=torch.float64).expand(kept.shape))
        return compare(actual, kept.value)


@dataclass
class Drift:
    """What a regeneration found: kept unchanged, made anew, and for each change one line that names what drifted."""

    kept: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def golden_dir() -> Path:
    """Where goldens are: KTVERIFY_GOLDEN_DIR, else golden/ beside the package (a checkout), else ./golden."""
    named = os.environ.get(_ENVIRONMENT)
    if named:
        return Path(named)
    beside = ROOT / "golden"
    return beside if (beside / MANIFEST).exists() or not (Path.cwd() / "golden").exists() else Path.cwd() / "golden"


def cache_dir() -> Path:
    """Where full fp64 tensors go: .cache/ktverify/golden beside the goldens; git ignores it."""
    return golden_dir().parent / ".cache" / "ktverify" / "golden"


def load(case: Case, directory: Path | None = None) -> Golden:
    """The golden of `case`. NoGolden where there is none for just this case and seed; ValueError for a broken file."""
    where = directory or golden_dir()
    return _from_entry(case, _entry(case, where), where)


def has(case: Case) -> bool:
    """Whether the manifest has a golden for just this case and seed."""
    try:
        _entry(case, golden_dir())
    except NoGolden:
        return False
    return True


def _entry(case: Case, where: Path) -> dict[str, Any]:
    """What the manifest says of the golden of `case`. NoGolden where there is none."""
    entry: dict[str, Any] | None = _read_manifest(where)["cases"].get(case.id)
    if entry is None:
        raise NoGolden(f"no golden for {case.id} in {where}; `python -m ktverify.golden regenerate` makes them")
    if entry["case"] != case.spec:
        raise NoGolden(f"the golden of {case.id} is of {entry['case']}, the catalogue has {case.spec}")
    return entry


def load_full(case: Case) -> dict[str, torch.Tensor]:
    """ALL_TENSORS in fp64 from the cache that `regenerate --full` fills. NoGolden where it was not filled."""
    path = cache_dir() / f"{_file_stem(case)}.safetensors"
    try:
        return load_safetensors(path.read_bytes())
    except FileNotFoundError:
        only = f"python -m ktverify.golden regenerate --full --only {case.name}"
        raise NoGolden(f"no full tensors of {case.id} in {path.parent}; `{only}` makes them") from None


def regenerate(
    only: str | None = None,
    *,
    directory: Path | None = None,
    check: bool = False,
    force: bool = False,
    full: bool = False,
    progress: Progress = lambda text, share: None,
) -> Drift:
    """Compute the fp64 oracle of every row of the catalogue (or those that the glob `only` names) and keep its answers.

    A golden whose inputs are the same and whose values agree to 1e-10 is left as it is, unless `force`. check writes
    nothing. full also writes the whole fp64 tensors into the cache. progress(text, share of the work done) is called
    before each case. ValueError where `only` names no case or another process is at it.
    """
    where = directory or golden_dir()
    cases = select(only)
    if not cases:
        raise ValueError(f"no case matches {only!r}; `python -m ktverify list` prints the names")
    strangers = [case.id for case in cases if catalogue().get(case.name) != case]
    if strangers:
        raise ValueError(f"{strangers[0]} is no row of the catalogue; goldens are kept of rows only")
    drift = Drift()
    if check:
        _work(cases, only, where, None, drift, force, full, progress)
        return drift
    where.mkdir(parents=True, exist_ok=True)
    with _alone(where), _staging(where) as staging:
        entries = _work(cases, only, where, staging, drift, force, full, progress)
        _publish(where, staging, entries)
    return drift


# ---------------------------------------------------------------- making


def _work(
    cases: list[Case],
    only: str | None,
    where: Path,
    staging: Path | None,
    drift: Drift,
    force: bool,
    full: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Compare or make each case; the manifest's entries after it. staging None: nothing is written."""
    old: dict[str, Any] = _read_manifest(where, missing_ok=True)["cases"]
    # entries of rows that are gone go when everything is looked at
    rows = {case.id for case in catalogue().values()}
    entries = {key: entry for key, entry in old.items() if key in rows}
    if only is None:
        drift.lines += [f"{key}: is no row of the catalogue any more" for key in old if key not in rows]
    else:
        entries = dict(old)
    costs = [flops(case, backward=True) + 1e9 for case in cases]
    done = 0.0
    for case, cost in zip(cases, costs, strict=True):
        progress(case.name, done / sum(costs))
        made, tensors = _make(case)
        lines = _differs(case, old.get(case.id), made, where)
        drift.lines += [f"{case.id}: {line}" for line in lines]
        if lines or force:
            drift.made.append(case.id)
            if staging is not None:
                entries[case.id] = _write(made, staging)
        else:
            drift.kept.append(case.id)
        if full and staging is not None:
            _write_full(case, tensors)
        done += cost
    progress("", 1.0)
    return entries


def _make(case: Case) -> tuple[Golden, dict[str, torch.Tensor]]:
    """The golden of `case`, computed, and the oracle's tensors in fp64."""
    inputs = make_inputs(case)
    sha256 = inputs_sha256(inputs)
    expected = forward_backward(inputs)
    peer = peer_error(inputs, expected)
    kept = {name: _keep(case, name, expected[name]) for name in ALL_TENSORS}
    return Golden(case, sha256, torch.__version__, kept, peer), expected


def _keep(case: Case, name: str, tensor: torch.Tensor) -> Kept:
    shape = tuple(tensor.shape)
    sha256 = _tensor_sha256(tensor)
    if not any(count_nonzero(part) for part in tensor):
        return Kept(shape, "zero", sha256, None)
    if case.exact:
        return Kept(shape, "full", sha256, tensor.to(_output_dtype(case, name)))
    if tensor.numel() <= FULL_LIMIT or not bool(torch.isfinite(tensor).all()):
        return Kept(shape, "full", sha256, tensor.float())
    return Kept(shape, "sketch", sha256, make_sketch(tensor, f"{case.name} {name}"))


def _output_dtype(case: Case, name: str) -> torch.dtype:
    if name == GRAD_WEIGHTS:
        return torch.float32
    if name.startswith("grad_") and "_lora_" in name and case.lora_dtype == "float32":
        return torch.float32
    return torch.bfloat16


def _differs(case: Case, entry: dict[str, Any] | None, made: Golden, where: Path) -> list[str]:
    """One line for each thing in which the kept golden is not what was made now; empty where it may stay."""
    if entry is None:
        return ["has no golden"]
    if entry["case"] != case.spec:
        return [f"was {entry['case']}, is {case.spec}"]
    if entry["generator"] != GENERATOR_VERSION or entry["sketch"] != SKETCH_VERSION:
        return [f"was made by generator {entry['generator']} and sketch {entry['sketch']}"]
    if entry["inputs_sha256"] != made.inputs_sha256:
        return [f"inputs have SHA-256 {made.inputs_sha256[:12]}, the golden was made of {entry['inputs_sha256'][:12]}"]
    try:
        kept = _from_entry(case, entry, where)
    except ValueError as error:
        return [str(error)]
    lines = []
    for name in ALL_TENSORS:
        line = _tensor_differs(kept.tensors[name], made.tensors[name])
        if line:
            lines.append(f"{name} {line}")
        old, new = kept.peer[name], made.peer[name]
        if abs(new - old) > SAME_PEER * max(old, _PEER_FLOOR):
            lines.append(f"{name}: the plain bf16 peer errs by {new:.3e}, the golden says {old:.3e}")
    return lines


def _tensor_differs(old: Kept, new: Kept) -> str:
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


# ---------------------------------------------------------------- writing


def _write(golden: Golden, staging: Path) -> dict[str, Any]:
    """Write the golden's values into `staging`; its entry in the manifest."""
    values: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    for name, kept in golden.tensors.items():
        told[name] = {"shape": list(kept.shape), "kind": kept.kind, "sha256": kept.sha256, "peer": golden.peer[name]}
        if isinstance(kept.value, Sketch):
            for part in Sketch.ARRAYS:
                values[f"{name}.{part}"] = torch.from_numpy(getattr(kept.value, part))
            told[name].update({part: getattr(kept.value, part) for part in Sketch.SCALARS}, seed=kept.value.seed)
        elif kept.value is not None:
            values[name] = kept.value.contiguous()
    content = save_safetensors(values)
    digest = hashlib.sha256(content).hexdigest()
    path = f"{_file_stem(golden.case)}.{digest[:12]}.safetensors"
    write_whole(staging / path, content)
    return {
        "case": golden.case.spec,
        "file": path,
        "file_sha256": digest,
        "generator": GENERATOR_VERSION,
        "sketch": SKETCH_VERSION,
        "torch": golden.torch_version,
        "inputs_sha256": golden.inputs_sha256,
        "tensors": told,
    }


def _publish(where: Path, staging: Path, entries: dict[str, Any]) -> None:
    """New files first, then the manifest in one step, then what nobody names any more goes."""
    for path in sorted(staging.iterdir()):
        os.replace(path, where / path.name)
    order = [case.id for case in catalogue().values()]
    known = [key for key in order if key in entries] + sorted(set(entries) - set(order))
    document = {"format": FORMAT, "cases": {key: entries[key] for key in known}}
    text = json.dumps(document, indent=1, allow_nan=True) + "\n"
    manifest = where / MANIFEST
    if not manifest.exists() or manifest.read_text(encoding="utf-8") != text:
        write_whole(manifest, text)
    named = {entry["file"] for entry in entries.values()}
    for path in where.glob("*.safetensors"):
        if path.name not in named:
            path.unlink()


def _write_full(case: Case, tensors: dict[str, torch.Tensor]) -> None:
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{_file_stem(case)}.safetensors"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        # gigabytes: written tensor by tensor, not through one string of bytes
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _staging(where: Path) -> Iterator[Path]:
    """A directory beside the goldens, on the same file system; what killed processes left of theirs goes."""
    for left in where.glob(".staging-*"):
        shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=where))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _alone(where: Path) -> Iterator[None]:
    lock = FileLock(where / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process regenerates the goldens in {where}") from None
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- reading


def _read_manifest(where: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    path = where / MANIFEST
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {"format": FORMAT, "cases": {}}
        raise NoGolden(f"no {path}; `python -m ktverify.golden regenerate` makes it") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; check it out of git again") from error
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} has format {document.get('format')!r}, this version reads {FORMAT}")
    return document


def _from_entry(case: Case, entry: dict[str, Any], where: Path) -> Golden:
    path = where / entry["file"]
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; check it out of git again, or regenerate") from None
    if hashlib.sha256(content).hexdigest() != entry["file_sha256"]:
        raise ValueError(f"{path} is not what the manifest says; check it out of git again, or regenerate")
    values = load_safetensors(content)
    tensors: dict[str, Kept] = {}
    for name, told in entry["tensors"].items():
        shape = tuple(told["shape"])
        value: torch.Tensor | Sketch | None = None
        if told["kind"] == "full":
            value = values[name]
        elif told["kind"] == "sketch":
            arrays: dict[str, Any] = {part: values[f"{name}.{part}"].numpy() for part in Sketch.ARRAYS}
            scalars: dict[str, Any] = {part: told[part] for part in Sketch.SCALARS}
            value = Sketch(shape=shape, seed=told["seed"], **arrays, **scalars)
        tensors[name] = Kept(shape, told["kind"], told["sha256"], value)
    peer = {name: float(told["peer"]) for name, told in entry["tensors"].items()}
    expected = tensors_of(case)
    for name in ALL_TENSORS:
        if name not in tensors or tensors[name].shape != expected[name]:
            raise ValueError(f"the golden of {case.id} has no {name} of shape {list(expected[name])}; regenerate it")
    return Golden(case, entry["inputs_sha256"], entry["torch"], tensors, peer)


def _file_stem(case: Case) -> str:
    return case.name if case.seed == 0 else f"{case.name}-{case.seed}"


def _tensor_sha256(tensor: torch.Tensor) -> str:
    """Of the fp64 values, row by row. Zeros are hashed as such, without reading what idle experts left untouched."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for part in tensor:
        if count_nonzero(part):
            array: Any = part.contiguous().reshape(-1).numpy()
            digest.update(memoryview(array).cast("B"))
        else:
            digest.update(b"0")
    return digest.hexdigest()
