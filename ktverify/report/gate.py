"""The gate over a run: list what broke, in the run alone or against a baseline.

The baseline may come from another machine, and the run from a part of the suites: what both could run is compared
strictly; what this machine or this selection leaves out is counted. Times are never gated: they belong to the machine
and the hour.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass

from ktverify.checks import isas
from ktverify.engines.registry import NATIVE
from ktverify.report import baseline as files
from ktverify.report.baseline import Baseline, BaselineEntry, by_key, key_of
from ktverify.report.known_failures import Compared, KnownFailures, compare
from ktverify.report.numbers import error, many
from ktverify.report.problems import problem_text
from ktverify.report.tables import base_isa, run_verdict
from ktverify.runs.record import NOT_RUN, AccuracyRecord, AnyRecord, worst_first
from ktverify.runs.store import Run
from ktverify.spec.cases import USUAL_TIERS, catalogue, select
from ktverify.system.instruction_sets import AMX, ISA_FLAGS

# the reason of a check that an engine disclaims: the capability, and the value that the check needs
_DISCLAIMED = re.compile(r"^(UNSUPPORTED \w+) \S+ is disclaimed$")


@dataclass(frozen=True)
class Growth:
    """How far rel_l2 may grow beyond the baseline: by `factor`; below `floor` growth does not count."""

    factor: float
    floor: float


@dataclass(frozen=True)
class GateReport:
    """What the gate found: `breaks` make it fail; `notes` do not; `checked` checks ran, `known` of which fail as a file
    of known failures says."""

    breaks: tuple[str, ...]
    notes: tuple[str, ...]
    checked: int
    known: int = 0

    @property
    def passed(self) -> bool:
        return not self.breaks


def growth() -> Growth:
    """The allowed growth, from the [gate] table of tolerances.toml."""
    from ktverify.judge.gates import tolerances

    table = tolerances()["gate"]
    return Growth(factor=float(table["rel_l2_growth"]), floor=float(table["rel_l2_floor"]))


def judge_run(
    run: Run,
    baseline: Baseline | None = None,
    allowed: Growth | None = None,
    known_failures: KnownFailures | None = None,
) -> GateReport:
    """Judge a run. These break it: a verdict that is not a pass, no check that ran, a run that did not finish; against
    `baseline`, a check that is missing or no longer runs, an error that grew by more than `allowed`, else growth().
    What `known_failures` covers must fail: it breaks the run where it passes.
    """
    breaks: list[str] = []
    notes: list[str] = []
    earlier = baseline.checks if baseline is not None else {}
    ran = sum(record.verdict not in NOT_RUN for record in run.records)
    if ran == 0:
        breaks.append(run_verdict(run)[1])
    if not run.finished:
        breaks.append("The run did not finish: its records are what was there when it ended.")
    elif run.head is not None and run.head.exit_status and all(r.verdict in (*NOT_RUN, "PASS") for r in run.records):
        # a collection error or an interrupted session leaves no record
        breaks.append(f"pytest ended with exit status {run.head.exit_status}, but no record says why.")
    breaks += [f"A record is lost: {sentence}" for sentence in run.lost]
    beside = Compared() if known_failures is None else compare(known_failures, run)
    breaks += beside.wrong
    notes += beside.notes
    as_known = set(map(id, beside.known))
    left: dict[str, list[str]] = {}
    for record in worst_first(run.records):
        if id(record) in as_known:
            continue
        if record.verdict == "PASS":
            if isinstance(record, AccuracyRecord) and not record.gates:
                breaks.append(f"{key_of(record)}: PASS without a single gate")
            continue
        line, key = problem_text(record), key_of(record)
        before = earlier.get(key)
        if record.verdict not in NOT_RUN:
            breaks.append(line)
        elif before is not None and before.verdict == "PASS" and not _left_out(key, before, run):
            breaks.append(f"{line.splitlines()[0]} (it was PASS in the baseline)")
        else:
            reason = line.splitlines()[0].partition(": ")[2]
            left.setdefault(_DISCLAIMED.sub(r"\1", reason), []).append(line.splitlines()[0])
    # one note for all checks that were left out for the same reason, or for values of one capability
    for lines in left.values():
        more = f" (and {many(len(lines) - 1, 'more check')})" if lines[1:] else ""
        notes.append(lines[0] + more)
    if baseline is not None:
        _compare(by_key(run), baseline, allowed or growth(), run, breaks, notes)
    return GateReport(tuple(breaks), tuple(notes), ran, len(beside.known))


def _compare(
    checks: dict[str, AnyRecord], baseline: Baseline, allowed: Growth, run: Run, breaks: list[str], notes: list[str]
) -> None:
    """Add to `breaks` and `notes` the checks that the run lacks and the errors that grew."""
    left_out: Counter[str] = Counter()
    emulated: Counter[bool] = Counter()
    for key, before in sorted(baseline.checks.items()):
        record = checks.get(key)
        if record is None:
            reason = _left_out(key, before, run)
            if reason:
                left_out[reason] += 1
            elif before.verdict in NOT_RUN:
                notes.append(f"missing, was {before.verdict} in the baseline: {key}")
            else:
                breaks.append(f"missing: {key} (it was {before.verdict} in the baseline)")
            continue
        if record.isa != before.isa and base_isa(record.isa) == base_isa(before.isa) == AMX:
            emulated[record.isa != AMX] += 1
        if isinstance(record, AccuracyRecord) and record.verdict == "PASS" and before.rel_l2 is not None:
            # a new seed makes other inputs with other errors: its budgets judge it, not growth
            if record.case != before.case or not math.isfinite(before.rel_l2):
                continue
            bound = max(before.rel_l2 * allowed.factor, allowed.floor)
            if not record.rel_l2 <= bound:
                now, then, most = map(error, (record.rel_l2, before.rel_l2, bound))
                breaks.append(f"grown: {key} rel_l2 {now}, baseline {then}, at most {most}")
    notes += [f"{count} checks of the baseline {reason}" for reason, count in left_out.most_common()]
    for here, count in emulated.items():
        one, other = ("emulated", "real") if here else ("real", "emulated")
        notes.append(f"{AMX} is {one} in this run and {other} in the baseline: {count} checks were compared")
    new = len(checks.keys() - baseline.checks.keys())
    if new:
        notes.append(f"{new} checks are not in the baseline")


def _left_out(key: str, before: BaselineEntry, run: Run) -> str:
    """Why the run cannot have a check of the baseline: for its machine or for what it was asked; "" if it can.

    The CPU's flags decide about the machine, not what the engine reports.
    """
    if run.head is None:
        return ""
    kind, family, what = key.split(" ")[:3]
    selection, machine = run.head.selection, run.head.machine
    if selection.folders and family not in selection.folders:
        return f"are in folders of suites/ that this run was not asked for ({family})"
    if selection.rest:
        return f"may be left out by {', '.join(selection.rest)}"
    case = catalogue().get(what) if kind == "accuracy" else None
    if case is not None and case not in select(selection.cases, selection.tier or USUAL_TIERS):
        return "are of cases that --cases or --tier leaves out"
    isa = base_isa(before.isa)
    if isa not in ISA_FLAGS:
        return ""
    planned = isas.native_on(machine.isas, machine.amx.emulated and not machine.amx.usable)
    if run.head.engine != NATIVE:
        planned = [isas.Isa(name) for name in machine.isas]
    if kind == "latency":
        # on the best instruction set that is asked for; an emulated one has no time
        timed = [each for each in planned if selection.isa in ("all", each.name, each.id)]
        return "" if timed and not timed[0].emulated else "time an instruction set that is emulated here"
    if isa not in [each.name for each in planned]:
        return f"need {isa}, which this machine does not run"
    if case is not None and isa not in [each.name for each in isas.of_tier(case.tier, planned)]:
        return f"are big cases, which this machine does not run on {isa}"
    if selection.isa not in ("all", isa, f"{isa}_emulated"):
        return f"are left out by --isa {selection.isa}"
    return ""


def write_baseline(
    run: Run, path: str | os.PathLike[str], *, force: bool = False, known_failures: KnownFailures | None = None
) -> Baseline:
    """Make a run the baseline at `path`; see `baseline.write`. ValueError if the run does not pass without one."""
    found = judge_run(run, known_failures=known_failures)
    if not found.passed:
        more = f" (and {len(found.breaks) - 1} more)" if len(found.breaks) > 1 else ""
        first = found.breaks[0].splitlines()[0]
        raise ValueError(f"{run.directory.name} does not pass and is no baseline: {first}{more}")
    return files.write(run, path, force=force)
