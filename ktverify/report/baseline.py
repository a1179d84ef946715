"""The gate over a run: list what broke, in the run alone or against a baseline.

A baseline is the verdicts and errors of a good run by check, as committed in `reports/baseline.json`. Times are never
gated: they belong to the machine and the hour.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ktverify.report.numbers import error
from ktverify.report.problems import problem_text
from ktverify.report.tables import base_isa, run_verdict
from ktverify.runs.jsonl import JsonLine
from ktverify.runs.record import NOT_RUN, AccuracyRecord, AnyRecord, CheckRecord, VerdictName, worst_first
from ktverify.runs.store import Run
from ktverify.system.files import write_whole
from ktverify.system.instruction_sets import ISA_FLAGS

FORMAT = 1


class BaselineEntry(JsonLine):
    """The result of a check when the baseline was written; `case` with its seed, `rel_l2` for accuracy only."""

    verdict: VerdictName
    isa: str = ""
    case: str = ""
    rel_l2: float | None = None


class Baseline(JsonLine):
    """The checks of a good run, by key."""

    format: int = FORMAT
    stamp: str
    engine: str
    commit: str
    cpu: str
    checks: dict[str, BaselineEntry]


@dataclass(frozen=True)
class Growth:
    """How far rel_l2 may grow beyond the baseline: by `factor`; below `floor` growth does not count."""

    factor: float
    floor: float


@dataclass(frozen=True)
class GateReport:
    """What the gate found: `breaks` make it fail; `notes` do not; `checked` checks ran."""

    breaks: tuple[str, ...]
    notes: tuple[str, ...]
    checked: int

    @property
    def passed(self) -> bool:
        return not self.breaks


def growth() -> Growth:
    """The allowed growth, from the [gate] table of tolerances.toml."""
    from ktverify.judge.gates import tolerances

    table = tolerances()["gate"]
    return Growth(factor=float(table["rel_l2_growth"]), floor=float(table["rel_l2_floor"]))


def key_of(record: AnyRecord) -> str:
    """The key of a check: two records with the same key differ in numbers, seed, engine and threads alone."""
    # an emulated instruction set computes the numbers of the real one
    isa = base_isa(record.isa)
    if isinstance(record, CheckRecord):
        parts = ["check", record.family, record.name, isa]
    else:
        what = record.tensor if isinstance(record, AccuracyRecord) else record.what
        parts = [record.kind, record.family, record.case.partition("@")[0], what, isa, f"tp={record.tp}"]
    return " ".join(part for part in parts if part)


def judge_run(run: Run, baseline: Baseline | None = None, allowed: Growth | None = None) -> GateReport:
    """Judge a run. These break it: a verdict that is not a pass, no check that ran, a run that did not finish; against
    `baseline`, a check that is missing or no longer runs, an error that grew by more than `allowed`, else growth().
    """
    breaks: list[str] = []
    notes: list[str] = []
    checks = _by_key(run)
    known = baseline.checks if baseline is not None else {}
    ran = sum(record.verdict not in NOT_RUN for record in run.records)
    if ran == 0:
        breaks.append(run_verdict(run)[1])
    if not run.finished:
        breaks.append("The run did not finish: its records are what was there when it ended.")
    elif run.head is not None and run.head.exit_status and all(r.verdict in (*NOT_RUN, "PASS") for r in run.records):
        # a collection error or an interrupted session leaves no record
        breaks.append(f"pytest ended with exit status {run.head.exit_status}, but no record says why.")
    if run.torn_lines:
        breaks.append(f"{run.torn_lines} record(s) were cut off while being written: a process was killed.")
    for record in worst_first(run.records):
        if record.verdict == "PASS":
            if isinstance(record, AccuracyRecord) and not record.gates:
                breaks.append(f"{key_of(record)}: PASS without a single gate")
            continue
        line = problem_text(record)
        before = known.get(key_of(record))
        if record.verdict not in NOT_RUN:
            breaks.append(line)
        elif before is not None and before.verdict == "PASS" and not _beyond_this_machine(before.isa, run):
            breaks.append(f"{line.splitlines()[0]} (it was PASS in the baseline)")
        else:
            notes.append(line.splitlines()[0])
    if baseline is not None:
        _compare(checks, baseline, allowed or growth(), run, breaks, notes)
    return GateReport(tuple(breaks), tuple(notes), ran)


def _compare(
    checks: dict[str, AnyRecord], baseline: Baseline, allowed: Growth, run: Run, breaks: list[str], notes: list[str]
) -> None:
    """Add to `breaks` and `notes` the checks that the run lacks and the errors that grew."""
    elsewhere: dict[str, int] = {}
    for key, before in sorted(baseline.checks.items()):
        record = checks.get(key)
        if record is None:
            if _beyond_this_machine(before.isa, run):
                elsewhere[before.isa] = elsewhere.get(before.isa, 0) + 1
            elif before.verdict in NOT_RUN:
                notes.append(f"missing, was {before.verdict} in the baseline: {key}")
            else:
                breaks.append(f"missing: {key} (it was {before.verdict} in the baseline)")
        elif isinstance(record, AccuracyRecord) and record.verdict == "PASS" and before.rel_l2 is not None:
            # a new seed makes other inputs with other errors: its budgets judge it, not growth
            if record.case != before.case or not math.isfinite(before.rel_l2):
                continue
            bound = max(before.rel_l2 * allowed.factor, allowed.floor)
            if not record.rel_l2 <= bound:
                now, then, most = map(error, (record.rel_l2, before.rel_l2, bound))
                breaks.append(f"grown: {key} rel_l2 {now}, baseline {then}, at most {most}")
    for isa, count in elsewhere.items():
        notes.append(f"{count} checks of the baseline need {isa}, which this machine does not run")
    new = len(checks.keys() - baseline.checks.keys())
    if new:
        notes.append(f"{new} checks are not in the baseline")


def _beyond_this_machine(isa: str, run: Run) -> bool:
    """Whether the machine of the run lacks `isa`. The CPU's flags decide, not what the engine reports."""
    if run.head is None or base_isa(isa) not in ISA_FLAGS:
        return False
    runs = set(run.head.machine.isas)
    # AMX tiles are emulated where they are missing; the kernels around them need AVX-512
    if "avx512_bf16" in runs:
        runs.add("amx_bf16")
    return base_isa(isa) not in runs


def _by_key(run: Run) -> dict[str, AnyRecord]:
    """Records by key; of two records of one check (two seeds), the worse one."""
    checks: dict[str, AnyRecord] = {}
    for record in worst_first(run.records):
        checks.setdefault(key_of(record), record)
    return checks


def write_baseline(run: Run, path: str | os.PathLike[str]) -> Baseline:
    """Write the baseline of `run`, one line per check so that a diff reads well.

    Raises ValueError if the run does not pass the gate without a baseline.
    """
    found, head = judge_run(run), run.head
    if not found.passed or head is None:
        more = f" (and {len(found.breaks) - 1} more)" if len(found.breaks) > 1 else ""
        first = found.breaks[0].splitlines()[0]
        raise ValueError(f"{run.directory.name} does not pass and is no baseline: {first}{more}")
    checks = {key: _entry(record) for key, record in sorted(_by_key(run).items())}
    baseline = Baseline(stamp=head.stamp, engine=head.engine, commit=head.commit, cpu=head.machine.cpu, checks=checks)
    about = baseline.model_dump(mode="json", exclude={"checks"})
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
    entries = [
        f"  {json.dumps(key)}: {json.dumps(entry.model_dump(mode='json', exclude_defaults=True))}"
        for key, entry in checks.items()
    ]
    lines.append(' "checks": {\n' + ",\n".join(entries) + "\n }")
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return baseline


def _entry(record: AnyRecord) -> BaselineEntry:
    case = "" if isinstance(record, CheckRecord) else record.case
    # four significant digits: enough to see growth, few enough to read
    rel_l2 = float(f"{record.rel_l2:.3e}") if isinstance(record, AccuracyRecord) else None
    return BaselineEntry(verdict=record.verdict, isa=record.isa, case=case, rel_l2=rel_l2)


def read_baseline(path: str | os.PathLike[str]) -> Baseline:
    """Read a baseline. Raises FileNotFoundError, or ValueError if the file is not a baseline."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no baseline at {path}: write one with `python -m ktverify gate RUN --write-baseline`")
    try:
        raw: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"{path} is no baseline of format {FORMAT}; write it again with --write-baseline")
        return Baseline.model_validate(raw)
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{path} is no baseline: {str(error).splitlines()[0]}") from None
