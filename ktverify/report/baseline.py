"""A baseline on disk: the verdicts and errors of a good run by check, as committed in `reports/baseline.json`.

A baseline belongs to one engine, and states what its run covered.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator

from ktverify.engines.registry import NATIVE
from ktverify.report.tables import base_isa
from ktverify.runs.jsonl import JsonLine
from ktverify.runs.record import (
    AccuracyRecord,
    AnyRecord,
    CheckRecord,
    LatencyRecord,
    Selection,
    VerdictName,
    worst_first,
)
from ktverify.runs.store import Run
from ktverify.system.files import write_whole

FORMAT = 1


class BaselineEntry(JsonLine):
    """The result of a check when the baseline was written; `case` with its seed, `rel_l2` for accuracy only."""

    verdict: VerdictName
    isa: str = ""
    case: str = ""
    rel_l2: float | None = None


class Baseline(JsonLine):
    """The checks of a good run, by key. isas: what its machine ran; selection: what its command line asked for."""

    format: int = FORMAT
    stamp: str
    engine: str
    commit: str
    cpu: str
    isas: tuple[str, ...] = ()
    selection: Selection = Selection()
    checks: dict[str, BaselineEntry]

    @field_validator("checks")
    @classmethod
    def _by_present_keys(cls, checks: dict[str, BaselineEntry]) -> dict[str, BaselineEntry]:
        """Keys of older baselines name emulated tiles, and the instruction set of a timing."""
        return {_present_key(key): entry for key, entry in checks.items()}


def key_of(record: AnyRecord) -> str:
    """The key of a check: two records with the same key differ in numbers, seed, engine, threads and machine alone.

    Real and emulated AMX are one instruction set. A timing has none: it is taken on the best one of its machine.
    """
    if isinstance(record, CheckRecord):
        parts = ["check", record.family, record.name, base_isa(record.isa)]
    else:
        isa = "" if isinstance(record, LatencyRecord) else base_isa(record.isa)
        what = record.tensor if isinstance(record, AccuracyRecord) else record.what
        parts = [record.kind, record.family, record.case.partition("@")[0], what, isa, f"tp={record.tp}"]
    return _present_key(" ".join(part for part in parts if part))


def _present_key(key: str) -> str:
    key = key.replace("amx_bf16_emulated", "amx_bf16")
    return re.sub(r"^(latency .*) \w+ (tp=\d+)$", r"\1 \2", key) if key.count(" ") == 5 else key


def by_key(run: Run) -> dict[str, AnyRecord]:
    """Records by key; of two records of one check (two seeds), the worse one."""
    checks: dict[str, AnyRecord] = {}
    for record in worst_first(run.records):
        checks.setdefault(key_of(record), record)
    return checks


def path_for(engine: str, reports: Path) -> Path:
    """Where the baseline of an engine is: `baseline.json` for the native one, else `baseline-<engine>.json`."""
    if engine == NATIVE:
        return reports / "baseline.json"
    # a path of an engine's file differs between machines, its name does not
    place, _, attribute = engine.partition(":")
    name = f"{Path(place).stem}-{attribute}" if place.endswith(".py") else engine
    return reports / f"baseline-{re.sub(r'[^A-Za-z0-9._]+', '-', name).strip('-.')}.json"


def write(run: Run, path: str | os.PathLike[str], *, force: bool = False) -> Baseline:
    """Write the baseline of a run that passed, one line per check so that a diff reads well.

    ValueError, and nothing is written, where `path` has a baseline of another engine or of checks that this run lacks,
    unless `force`.
    """
    head = run.head
    assert head is not None  # a run without one does not pass
    checks = {key: _entry(record) for key, record in sorted(by_key(run).items())}
    baseline = Baseline(
        stamp=head.stamp,
        engine=head.engine,
        commit=head.commit,
        cpu=head.machine.cpu,
        isas=head.machine.isas,
        selection=head.selection,
        checks=checks,
    )
    if not force and Path(path).exists():
        _refuse_loss(read(path), baseline, path)
    about = baseline.model_dump(mode="json", exclude={"checks"})
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
    entries = [
        f"  {json.dumps(key)}: {json.dumps(entry.model_dump(mode='json', exclude_defaults=True))}"
        for key, entry in checks.items()
    ]
    lines.append(' "checks": {\n' + ",\n".join(entries) + "\n }")
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return baseline


def _refuse_loss(old: Baseline, new: Baseline, path: str | os.PathLike[str]) -> None:
    """ValueError where `new` in the place of `old` would lose checks."""
    lost = old.checks.keys() - new.checks.keys()
    if old.engine != new.engine:
        raise ValueError(
            f"{path} is the baseline of engine {old.engine}, this run is of {new.engine}: name another file by "
            "--baseline, or replace it by --force"
        )
    if lost:
        raise ValueError(
            f"{path} has {len(old.checks)} checks, {len(lost)} of which this run of {len(new.checks)} lacks, as "
            f"{min(lost)}: name another file by --baseline, or replace it by --force"
        )


def _entry(record: AnyRecord) -> BaselineEntry:
    case = "" if isinstance(record, CheckRecord) else record.case
    # four significant digits: enough to see growth, few enough to read
    rel_l2 = float(f"{record.rel_l2:.3e}") if isinstance(record, AccuracyRecord) else None
    return BaselineEntry(verdict=record.verdict, isa=record.isa, case=case, rel_l2=rel_l2)


def read(path: str | os.PathLike[str]) -> Baseline:
    """Read a baseline. Raises FileNotFoundError, or ValueError if the file is not a baseline."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no baseline at {path}: write one with `python -m ktverify gate RUN --write-baseline`")
    try:
        raw: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"{path} is no baseline of format {FORMAT}; write it again with --write-baseline")
        return Baseline.model_validate(raw)
    except (ValidationError, ValueError, RecursionError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(text if str(path) in text else f"{path} is no baseline: {text}") from None
