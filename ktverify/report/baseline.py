"""The gate: from a run, and a baseline if there is one, to the list of what broke.

Comes in: a run. Goes out: breaks, each one line; none means that the run may be built upon. Times are never gated: they
belong to the machine and the hour. A baseline is a run's verdicts and errors by check, as committed in
`reports/baseline.json`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ktverify.report.problems import problem_text
from ktverify.report.tables import base_isa, error_text, run_verdict
from ktverify.runs.record import NOT_RUN, AccuracyRecord, LatencyRecord, Result, VerdictName, worst_first
from ktverify.runs.store import Run
from ktverify.system.files import write_whole
from ktverify.system.machine import ISA_FLAGS

FORMAT = 1


class BaselineEntry(BaseModel):
    """What a check found when the baseline was written; `case` with its seed, `rel_l2` for accuracy only."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    verdict: VerdictName
    isa: str = ""
    case: str = ""
    rel_l2: float | None = None


class Baseline(BaseModel):
    """The checks of a run that was good, by key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    stamp: str
    engine: str
    commit: str
    cpu: str
    checks: dict[str, BaselineEntry]


@dataclass(frozen=True)
class Growth:
    """How far rel_l2 may grow beyond the baseline: by `factor`, and never counted below `floor`."""

    factor: float
    floor: float


@dataclass(frozen=True)
class Finding:
    """What the gate found: `breaks` make it fail; `notes` are told and let it pass."""

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


def key_of(record: Result) -> str:
    """What makes two records the same check: all but the numbers, the seed, the engine and the number of threads."""
    # an emulated instruction set gives the numbers of the real one
    isa = base_isa(record.isa)
    parts: tuple[str, ...]
    if isinstance(record, AccuracyRecord):
        parts = ("accuracy", record.family, record.case.partition("@")[0], record.tensor, isa, f"tp={record.tp}")
    elif isinstance(record, LatencyRecord):
        parts = ("latency", record.family, record.case.partition("@")[0], record.what, isa, f"tp={record.tp}")
    else:
        parts = ("check", record.family, record.name, isa)
    return " ".join(part for part in parts if part)


def judge_run(run: Run, baseline: Baseline | None, allowed: Growth | None) -> Finding:
    """What broke in `run`: a verdict that is no pass, nothing checked, not finished; against `baseline`, a check that
    is missing or no longer runs, and an error that grew by more than `allowed` (needed with a baseline only).
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
        # a collection error or an interrupted session leaves no record that could tell of it
        breaks.append(f"pytest ended with exit status {run.head.exit_status}, though no record tells why.")
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
    return Finding(tuple(breaks), tuple(notes), ran)


def _compare(
    checks: dict[str, Result], baseline: Baseline, allowed: Growth, run: Run, breaks: list[str], notes: list[str]
) -> None:
    """Add what the baseline has and the run has not, and where errors grew."""
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
            # other inputs have other errors; a new seed is judged by its budgets, not by growth
            if record.case != before.case or not math.isfinite(before.rel_l2):
                continue
            bound = max(before.rel_l2 * allowed.factor, allowed.floor)
            if not record.rel_l2 <= bound:
                breaks.append(
                    f"grown: {key} rel_l2 {error_text(record.rel_l2)}, baseline {error_text(before.rel_l2)}, "
                    f"at most {error_text(bound)}"
                )
    for isa, count in elsewhere.items():
        notes.append(f"{count} checks of the baseline need {isa}, which this machine does not run")
    new = len(checks.keys() - baseline.checks.keys())
    if new:
        notes.append(f"{new} checks are not in the baseline")


def _beyond_this_machine(isa: str, run: Run) -> bool:
    """Whether the machine of the run lacks `isa`. Read from the CPU, so that an engine cannot talk itself out of it."""
    if run.head is None or base_isa(isa) not in ISA_FLAGS:
        return False
    runs = set(run.head.machine.isas)
    # where only the tiles are missing they are emulated; the kernels around them are AVX-512
    if "avx512_bf16" in runs:
        runs.add("amx_bf16")
    return base_isa(isa) not in runs


def _by_key(run: Run) -> dict[str, Result]:
    """Records by key; where a check stands twice (two seeds), the worse one."""
    checks: dict[str, Result] = {}
    for record in worst_first(run.records):
        checks.setdefault(key_of(record), record)
    return checks


def baseline_of(run: Run) -> Baseline:
    """The baseline that `run` makes. Raises ValueError if the run has no head or did not finish."""
    if run.head is None or not run.finished:
        raise ValueError(f"{run.directory} did not finish; a baseline needs a whole run")
    checks: dict[str, BaselineEntry] = {}
    for key, record in sorted(_by_key(run).items()):
        checks[key] = BaselineEntry(
            verdict=record.verdict,
            isa=record.isa,
            case=record.case if isinstance(record, (AccuracyRecord, LatencyRecord)) else "",
            rel_l2=_rounded(record.rel_l2) if isinstance(record, AccuracyRecord) else None,
        )
    head = run.head
    return Baseline(stamp=head.stamp, engine=head.engine, commit=head.commit, cpu=head.machine.cpu, checks=checks)


def write_baseline(run: Run, path: str | os.PathLike[str]) -> Baseline:
    """Write the baseline of `run`, one line per check so that a diff reads well.

    Raises ValueError if the run does not pass the gate on its own: nobody may build on a broken run.
    """
    found = judge_run(run, None, None)
    if not found.passed:
        raise ValueError(
            f"{run.directory.name} does not pass and is no baseline: {found.breaks[0].splitlines()[0]}"
            + (f" (and {len(found.breaks) - 1} more)" if len(found.breaks) > 1 else "")
        )
    baseline = baseline_of(run)
    head = baseline.model_dump(mode="json", exclude={"checks"})
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    entries = [
        f"  {json.dumps(key)}: {json.dumps(entry.model_dump(mode='json', exclude_defaults=True))}"
        for key, entry in baseline.checks.items()
    ]
    lines.append(' "checks": {\n' + ",\n".join(entries) + "\n }")
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return baseline


def read_baseline(path: str | os.PathLike[str]) -> Baseline:
    """Read a baseline. Raises FileNotFoundError, or ValueError if the file is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no baseline at {path}: write one with `python -m ktverify gate RUN --write-baseline`")
    try:
        raw: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"{path} is no baseline of format {FORMAT}; write it again with --write-baseline")
        return Baseline.model_validate(raw)
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{path} is no baseline: {str(error).splitlines()[0]}") from None


def _rounded(value: float) -> float:
    """Four significant digits: enough to see growth, few enough to read."""
    return float(f"{value:.3e}") if math.isfinite(value) else value
