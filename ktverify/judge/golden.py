"""Goldens on disk: the fp64 oracle's answers to the rows of the catalogue.

golden/manifest.json has one entry per case (see write_golden), golden/NAME.HASH.safetensors the values. HASH is of the
file's own content, so a new golden never overwrites an old one.

A tensor is stored as `full` (up to 16384 elements in fp32, or of any size in the output's own dtype where the case is
exact), `sketch` (larger; see golden_sketch.py) or `zero` (all zero, or no element). golden_regenerate.py makes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ktverify.errors import NoGolden
from ktverify.judge.golden_sketch import SKETCH_VERSION, Sketch, compare_sketch
from ktverify.judge.metrics import Difference, compare
from ktverify.judge.rounding import RoundingError
from ktverify.spec.cases import Case, tensors_of
from ktverify.spec.generator import GENERATOR_VERSION
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.files import GOLDENS, IN_CLONE, expand, write_whole

MANIFEST = "manifest.json"
FORMAT = 2
READABLE = (1, 2)  # 1 has no errors of rounding
SUFFIX = ".safetensors"
_RESTORE = "check it out of git again, or regenerate" if IN_CLONE else "install ktverify again"

Entry = dict[str, Any]  # a case's entry in the manifest

# by path, the text of each manifest that this process, or the one that it was forked from, read first or wrote itself
_known_texts: dict[str, str] = {}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a golden; value: the tensor (fp32 or the output's dtype), a Sketch, or None where it is zero."""

    shape: tuple[int, ...]
    kind: Literal["full", "sketch", "zero"]
    sha256: str
    value: torch.Tensor | Sketch | None


@dataclass(frozen=True)
class Golden:
    """The oracle's answer to one case, as far as it is stored. rounding: what errors of rounding do to each tensor."""

    case: Case
    inputs_sha256: str
    torch_version: str
    tensors: dict[str, StoredTensor]
    rounding: dict[str, RoundingError]

    def compare(self, name: str, actual: torch.Tensor) -> Difference:
        """The Difference of `actual` from the golden tensor `name`; estimated where only a sketch is stored.

        KeyError for an unknown name, ValueError for another shape.
        """
        stored = self.tensors[name]
        if isinstance(stored.value, Sketch):
            return compare_sketch(stored.value, actual)
        if stored.value is None:
            # one zero, expanded: takes no memory
            return compare(actual, torch.zeros(1, dtype=torch.float64).expand(stored.shape))
        return compare(actual, stored.value)


def golden_dir() -> Path:
    """The goldens' directory: KTVERIFY_GOLDEN_DIR, else those of the checkout or of the installed package."""
    named = os.environ.get("KTVERIFY_GOLDEN_DIR")
    return Path(expand(named)) if named else GOLDENS


def cache_dir() -> Path:
    """The directory of full fp64 tensors: .cache/ktverify/golden beside the goldens; git ignores it."""
    return golden_dir().parent / ".cache" / "ktverify" / "golden"


def full_path(case: Case) -> Path:
    """The file of the full fp64 tensors of `case` in the cache."""
    return cache_dir() / f"{_file_stem(case)}{SUFFIX}"


def load(case: Case, directory: Path | None = None) -> Golden:
    """The golden of `case`. NoGolden where this case and seed have none; ValueError for a broken file."""
    where = directory or golden_dir()
    return read_entry(case, _entry(case, where), where)


def has(case: Case) -> bool:
    """Whether the manifest has a golden for this case and seed."""
    with contextlib.suppress(NoGolden):
        return bool(_entry(case, golden_dir()))
    return False


def load_full(case: Case) -> dict[str, torch.Tensor]:
    """ALL_TENSORS in fp64 from the cache that `regenerate --full` fills. NoGolden where it has none of this case."""
    path = full_path(case)
    try:
        return load_safetensors(path.read_bytes())
    except FileNotFoundError:
        only = f"python -m ktverify.golden regenerate --full --only {case.name}"
        raise NoGolden(f"no full tensors of {case.id} in {path.parent}; `{only}` makes them") from None


def remember_manifest(where: Path) -> None:
    """Read the manifest, if there is one: from now on, `read_manifest` refuses another in its place.

    To be called before an engine runs: its process may write into the folder of the goldens.
    """
    with contextlib.suppress(OSError, ValueError):
        path = where / MANIFEST
        _known_texts.setdefault(os.path.abspath(path), path.read_text(encoding="utf-8"))


def read_manifest(where: Path, *, missing_ok: bool = False) -> dict[str, Entry]:
    """The manifest's entries by the id of their case.

    NoGolden without a manifest. ValueError for a broken one, and for one that another process has changed since this
    one read it.
    """
    path = where / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        document: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise NoGolden(f"no {path}; `python -m ktverify.golden regenerate` makes it") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; {_RESTORE}") from error
    if _known_texts.setdefault(os.path.abspath(path), text) != text:
        raise ValueError(f"{path} has changed since this process read it first; {_RESTORE}, and start again")
    if document.get("format") not in READABLE:
        raise ValueError(f"{path} has format {document.get('format')!r}, this version reads {FORMAT}")
    cases: dict[str, Entry] = document["cases"]
    for key, entry in cases.items():
        # such a file is read, and deleted when its row is gone: never one of another folder
        if Path(entry["file"]).name != entry["file"] or not entry["file"].endswith(SUFFIX):
            raise ValueError(f"{path}: the file of {key} is {entry['file']!r}; it takes the name of a {SUFFIX} file")
    return cases


def write_manifest(where: Path, entries: dict[str, Entry]) -> None:
    """Replace the manifest in one step; an unchanged one is not touched."""
    text = json.dumps({"format": FORMAT, "cases": entries}, indent=1, allow_nan=True) + "\n"
    path = where / MANIFEST
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)
    _known_texts[os.path.abspath(path)] = text


def _entry(case: Case, where: Path) -> Entry:
    """The manifest's entry for `case`. NoGolden where it has none."""
    entry = read_manifest(where).get(case.id)
    if entry is None:
        raise NoGolden(f"no golden for {case.id} in {where}; `python -m ktverify.golden regenerate` makes them")
    if entry["case"] != case.spec:
        raise NoGolden(f"the golden of {case.id} is of {entry['case']}, the catalogue has {case.spec}")
    return entry


def read_entry(case: Case, entry: Entry, where: Path) -> Golden:
    """The golden that an entry of the manifest describes. ValueError for a missing or changed file."""
    path = where / entry["file"]
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {_RESTORE}") from None
    if hashlib.sha256(content).hexdigest() != entry["file_sha256"]:
        raise ValueError(f"{path} is not what the manifest says; {_RESTORE}")
    values = load_safetensors(content)
    tensors: dict[str, StoredTensor] = {}
    for name, row in entry["tensors"].items():
        shape = tuple(row["shape"])
        value: torch.Tensor | Sketch | None = values[name] if row["kind"] == "full" else None
        if row["kind"] == "sketch":
            arrays: dict[str, Any] = {part: values[f"{name}.{part}"].numpy() for part in Sketch.ARRAYS}
            scalars: dict[str, Any] = {part: row[part] for part in Sketch.SCALARS}
            value = Sketch(shape=shape, seed=row["seed"], **arrays, **scalars)
        tensors[name] = StoredTensor(shape, row["kind"], row["sha256"], value)
    if not all("rounding" in row for row in entry["tensors"].values()):
        raise ValueError(f"the golden of {case.id} is of an older version of this suite; regenerate it")
    rounding = {name: RoundingError(**row["rounding"]) for name, row in entry["tensors"].items()}
    expected = tensors_of(case)
    for name in ALL_TENSORS:
        if name not in tensors or tensors[name].shape != expected[name]:
            raise ValueError(f"the golden of {case.id} has no {name} of shape {list(expected[name])}; regenerate it")
    return Golden(case, entry["inputs_sha256"], entry["torch"], tensors, rounding)


def write_golden(golden: Golden, directory: Path) -> Entry:
    """Write the golden's values into a new file in `directory`; returns its entry for the manifest."""
    values: dict[str, torch.Tensor] = {}
    rows: dict[str, Entry] = {}
    for name, stored in golden.tensors.items():
        facts = {"kind": stored.kind, "sha256": stored.sha256, "rounding": asdict(golden.rounding[name])}
        rows[name] = {"shape": list(stored.shape), **facts}
        if isinstance(stored.value, Sketch):
            for part in Sketch.ARRAYS:
                values[f"{name}.{part}"] = torch.from_numpy(getattr(stored.value, part))
            rows[name].update({part: getattr(stored.value, part) for part in Sketch.SCALARS}, seed=stored.value.seed)
        elif stored.value is not None:
            values[name] = stored.value.contiguous()
    content = save_safetensors(values)
    digest = hashlib.sha256(content).hexdigest()
    path = f"{_file_stem(golden.case)}.{digest[:12]}{SUFFIX}"
    write_whole(directory / path, content)
    return {
        "case": golden.case.spec,
        "file": path,
        "file_sha256": digest,
        "generator": GENERATOR_VERSION,
        "sketch": SKETCH_VERSION,
        "torch": golden.torch_version,
        "inputs_sha256": golden.inputs_sha256,
        "tensors": rows,
    }


def _file_stem(case: Case) -> str:
    return case.name if case.seed == 0 else f"{case.name}-{case.seed}"
