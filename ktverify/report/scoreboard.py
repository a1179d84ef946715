"""The scoreboard: how engines do, by family and instruction set, on one page of Markdown that mkdocs or GitHub shows.

A folder has the page, `index.md`, and a small JSON file for each run that it shows. A newer run of the same engine on
the same processor replaces the older one. What such a file contains may come from anybody: a file that is none is
refused with one line, and its texts are shown as texts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ktverify.report.numbers import NOTHING, number, ratio, used_budget
from ktverify.report.pages import render
from ktverify.report.tables import REFUSALS, isa_rank, overview, run_verdict
from ktverify.runs.jsonl import JsonLine
from ktverify.runs.record import NOT_RUN, AnyRecord, CheckRecord, VerdictName, worst_first
from ktverify.runs.store import Run
from ktverify.system.files import write_whole
from ktverify.system.machine import Machine
from ktverify.system.printable import shown_line

PAGE = "index.md"
# what makes a run of one engine for the page
COMMAND = "pytest suites/ -m 'not latency' --tier default -n 2 -q"
FAMILIES = (
    "forward", "backward", "exact", "training_loop", "tp_constraint", "tp_consistency", "quantised", "hybrid",
    "expert_parallel", "contract", "properties",
)  # fmt: skip
# the bench calls these engines otherwise
BENCH_NAMES = {"torch_loop": "torch_bf16", "vllm": "vllm_cpu"}
MOST_BYTES = 1 << 20  # of a summary
MOST_FAILURES = 20  # that a summary names
_MOST_USED = 10.0  # a share of a budget above it is "more than"

S = TypeVar("S", bound="Summary")


def _line(value: Any) -> Any:
    return shown_line(value, 500) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_line)]
Name = Annotated[str, BeforeValidator(_line), StringConstraints(min_length=1, max_length=200)]
Count = Annotated[int, Field(strict=True, ge=0, le=10**7)]
Share = Annotated[float, Field(ge=0)]  # of a budget; infinite where an exact gate failed
Amount = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class ScoreLine(JsonLine):
    """Base of all parts of a summary: finite numbers, whole files, no unknown field."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ScoredMachine(ScoreLine):
    """Where a run was made."""

    cpu: Text
    isas: tuple[Text, ...]
    threads: Count
    memory_bytes: Annotated[int, Field(strict=True, ge=0, le=1 << 60)]
    system: Text
    versions: dict[Name, Text]

    @classmethod
    def of(cls, machine: Machine) -> ScoredMachine:
        return cls.model_validate({name: getattr(machine, name) for name in cls.model_fields})


class Summary(ScoreLine):
    """What every summary has. at: seconds since 1970, when the run began. note: what a reader has to know of it."""

    engine: Name
    command: Text
    commit: Text = ""
    at: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    machine: ScoredMachine
    note: Text = ""

    @property
    def name(self) -> str:
        """Of its file and of its place on the page."""
        return _name(getattr(self, "kind", ""), self)


def _name(kind: str, summary: Summary) -> str:
    text = f"{kind}-{summary.engine}-{summary.machine.cpu}"
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:100]


class FamilyScore(ScoreLine):
    """One family on one instruction set, "" for the engine's own choice. used: of the record that came nearest to its
    budget, or exceeded it most; None where no error was measured. refusals_missing: bad arguments that were taken."""

    family: Name
    isa: Text = ""
    verdicts: dict[VerdictName, Count]
    used: Share | None = None
    nearest: Text = ""
    refusals_missing: Count = 0

    @property
    def passed(self) -> int:
        return self.verdicts.get("PASS", 0)

    @property
    def ran(self) -> int:
        return sum(count for verdict, count in self.verdicts.items() if verdict not in NOT_RUN)

    @property
    def not_run(self) -> int:
        return sum(count for verdict, count in self.verdicts.items() if verdict in NOT_RUN)


class SuiteSummary(Summary):
    """A run of the suites on one engine. failures: the worst records that did not pass, a line each."""

    kind: Literal["suite"] = "suite"
    stamp: Name
    verdict: Text
    failures: Annotated[tuple[Text, ...], Field(max_length=MOST_FAILURES)] = ()
    scores: Annotated[tuple[FamilyScore, ...], Field(min_length=1, max_length=1000)]

    @classmethod
    def of(cls, run: Run) -> SuiteSummary:
        """ValueError for a run that did not finish, or of which lines are lost."""
        head = run.head
        if head is None or not run.finished or run.lost:
            why = run.lost[0] if run.lost else "it did not finish"
            raise ValueError(f"{run.directory} is no run for the scoreboard: {why}")
        missing = Counter(
            (check.family, check.isa)
            for check in run.checks
            if check.name.startswith(REFUSALS) and check.verdict == "FAIL"
        )
        scores = [
            FamilyScore(
                family=row.family,
                isa=row.isa,
                verdicts=dict(row.counts),
                # NaN is beyond every budget
                used=None if row.worst is None else math.inf if math.isnan(row.worst.used) else row.worst.used,
                nearest=f"{row.worst.tensor} of {row.worst.case}" if row.worst is not None else "",
                refusals_missing=missing[row.family, row.isa],
            )
            for row in overview(run)
        ]
        return cls(
            engine=head.engine,
            command=head.command,
            commit=head.commit,
            at=head.started,
            machine=ScoredMachine.of(head.machine),
            stamp=head.stamp,
            verdict=run_verdict(run)[1],
            failures=tuple(map(_failure, [r for r in worst_first(run.records) if _failed(r)][:MOST_FAILURES])),
            scores=tuple(scores),
        )


def _failed(record: AnyRecord) -> bool:
    return record.verdict not in ("PASS", *NOT_RUN)


def _failure(record: AnyRecord) -> str:
    if isinstance(record, CheckRecord):
        what = record.name
    else:
        what = f"{getattr(record, 'tensor', record.family)} of {record.case}"
    return f"{record.verdict} {record.family}: {what}: {shown_line(record.message, 250)}"


class CallSpeed(ScoreLine):
    """The shortest forward or backward of a bench run. over_limit: over the time that the machine's limits allow."""

    ms: Amount
    over_limit: Amount | None = None


class SpeedScore(ScoreLine):
    """One engine at one shape. reason: why a time is missing, "" if none is."""

    engine: Name
    title: Name
    shape: Name
    isa: Text = ""
    lora: bool = True
    forward: CallSpeed | None = None
    backward: CallSpeed | None = None
    reason: Text = ""


class BenchSummary(Summary):
    """A run of `bench shapes`: several engines in turn. engine: "bench"."""

    kind: Literal["bench"] = "bench"
    stamp: Name
    threads: Count
    scores: Annotated[tuple[SpeedScore, ...], Field(min_length=1, max_length=1000)]


class NotRunSummary(Summary):
    """An engine that could not be run on a machine. command: what runs it where it can."""

    kind: Literal["not_run"] = "not_run"
    reason: Name


AnySummary = SuiteSummary | BenchSummary | NotRunSummary
_ADAPTER: TypeAdapter[AnySummary] = TypeAdapter(Annotated[AnySummary, Field(discriminator="kind")])


def read(path: Path) -> AnySummary:
    """The summary in a file. ValueError, in one line, for a file that is none."""
    with path.open("rb") as opened:
        data = opened.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} is no summary of a run: it has more than {MOST_BYTES} bytes")
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError as wrong:
        first = wrong.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(shown_line(f"{path} is no summary of a run: {where}: {first['msg']}", 500)) from None


def write(summaries: Iterable[AnySummary], directory: Path) -> list[AnySummary]:
    """Write the summaries and the page into `directory`; returns all that the page shows, those there before included.

    ValueError for a file of the directory that is no summary; then nothing is written.
    """
    found = {}
    for path in sorted(directory.glob("*.json")):
        summary = read(path)
        if summary.name != path.stem:
            raise ValueError(f"{path} is of a run that belongs into {summary.name}.json: rename it")
        found[summary.name] = summary
    before = set(found)
    new = {summary.name: summary for summary in sorted(summaries, key=lambda summary: summary.at)}
    for name, summary in new.items():
        # of an engine's runs, and of a note that it cannot run there, the latest counts
        rivals = {name, _rival_of(summary)} & found.keys()
        if all(found[rival].at <= summary.at for rival in rivals):
            found[name] = summary
            for rival in rivals - {name}:
                del found[rival]
    for name in before - found.keys():
        (directory / f"{name}.json").unlink()
    for name in new.keys() & found.keys():
        write_whole(directory / f"{name}.json", found[name].model_dump_json(indent=1) + "\n")
    shown = list(found.values())
    write_whole(directory / PAGE, page(shown))
    return shown


def _rival_of(summary: AnySummary) -> str:
    """The name of the note that this engine cannot run there, or of the run that says that it can; "" of a bench."""
    other = {"suite": "not_run", "not_run": "suite"}.get(summary.kind)
    return "" if other is None else _name(other, summary)


# ---- the page


@dataclass(frozen=True)
class Cell:
    """A cell that links to a run. bad: shown as what did not pass, with its sign."""

    text: str
    detail: str = ""
    bad: bool = False


def page(summaries: Sequence[AnySummary]) -> str:
    """The page as Markdown. Every text of a run is within a block of HTML, and escaped there."""
    suites = sorted(_of(summaries, SuiteSummary), key=_place)
    benches = sorted(_of(summaries, BenchSummary), key=_place)
    absent = sorted(_of(summaries, NotRunSummary), key=_place)
    present = {score.family for suite in suites for score in suite.scores}
    families = [*(family for family in FAMILIES if family in present), *sorted(present - set(FAMILIES))]
    return render(
        "scoreboard.md.j2",
        suites=[(suite, _overall(suite), _rows(suite, families)) for suite in suites],
        families=families,
        benches=[(bench, [(score, *map(_speed, (score.forward, score.backward))) for score in bench.scores])
                 for bench in benches],
        absent=absent,
        speeds={suite.name: _speeds(suite, benches) for suite in suites},
        used=_used,
        nothing=NOTHING,
        utc=_utc,
    )  # fmt: skip


def _of(summaries: Sequence[AnySummary], kind: type[S]) -> list[S]:
    return [summary for summary in summaries if isinstance(summary, kind)]


def _place(summary: Summary) -> tuple[bool, str, str]:
    return summary.engine != "native", summary.engine, summary.machine.cpu


def _overall(suite: SuiteSummary) -> dict[str, Cell]:
    passed, ran = (sum(getattr(score, name) for score in suite.scores) for name in ("passed", "ran"))
    missing = sum(score.refusals_missing for score in suite.scores)
    used = [score.used for score in suite.scores if score.used is not None]
    return {
        "passed": _passed(passed, ran),
        "not run": Cell(str(sum(score.not_run for score in suite.scores))),
        "worst error": Cell(_used(max(used)) if used else NOTHING, bad=bool(used) and max(used) > 1),
        "refusals missing": Cell(str(missing), bad=missing > 0),
    }


def _rows(suite: SuiteSummary, families: Sequence[str]) -> list[tuple[str, list[Cell]]]:
    """(instruction set, a cell for each family), best instruction set first."""
    by_place = {(score.isa, score.family): score for score in suite.scores}
    rows = []
    for isa in sorted({score.isa for score in suite.scores}, key=lambda isa: (not isa, isa_rank(isa))):
        scores = [by_place.get((isa, family)) for family in families]
        rows.append((isa, [_cell(score) for score in scores]))
    return rows


def _cell(score: FamilyScore | None) -> Cell:
    if score is None:
        return Cell(NOTHING)
    if not score.ran:
        return Cell("not run")
    found = _passed(score.passed, score.ran)
    return found if score.used is None else Cell(found.text, _used(score.used), found.bad)


def _passed(passed: int, ran: int) -> Cell:
    return Cell(f"{'✓' if passed == ran else '✗'} {passed} of {ran}", bad=passed != ran) if ran else Cell("none ran")


def _used(used: float | None) -> str:
    if used is None:
        return ""
    return f"> {used_budget(_MOST_USED)}" if used > _MOST_USED else used_budget(used)


def _speed(speed: CallSpeed | None) -> tuple[str, str]:
    """Milliseconds, and how many times the limit."""
    if speed is None:
        return NOTHING, NOTHING
    return number(speed.ms), NOTHING if speed.over_limit is None else ratio(speed.over_limit)


def _speeds(suite: SuiteSummary, benches: Sequence[BenchSummary]) -> list[tuple[str, str]]:
    """(text, place of the bench run) for forward and backward: lowest and highest over the shapes of one machine."""
    found = []
    for what in ("forward", "backward"):
        for bench in benches:
            mine = [s for s in bench.scores if BENCH_NAMES.get(s.engine, s.engine) == suite.engine]
            calls: list[CallSpeed | None] = [getattr(score, what) for score in mine]
            ratios = [call.over_limit for call in calls if call is not None and call.over_limit is not None]
            if ratios and bench.machine.cpu == suite.machine.cpu:
                low, high = ratio(min(ratios)), ratio(max(ratios))
                found.append((low if low == high else f"{low} to {high}", bench.name))
                break
        else:
            found.append((NOTHING, ""))
    return found


def _utc(at: float) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M")
