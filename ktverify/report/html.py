"""report.html: one page, complete in itself, that tells the verdict first and every number on demand.

Comes in: a run. Goes out: the page's text. Plots are inline SVG, style and the one small script (it filters the long
tables) are in the page, and its content policy forbids the browser to load anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ktverify.report import plots, tables
from ktverify.report.record import NOT_RUN, AccuracyRecord, CheckRecord, LatencyRecord, Result, VerdictName, worst_first
from ktverify.report.store import Run

PROBLEMS_SHOWN = 8
LINES_SHOWN = 12
ACCURACY_SHOWN = 15


def page(run: Run) -> str:
    """The whole page of `run` as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    passed, sentence = tables.run_verdict(run)
    overview = tables.overview(run.records)
    checks = [record for record in worst_first(run.checks) if isinstance(record, CheckRecord)]
    problems = [r for r in worst_first(run.records) if r.verdict not in (*NOT_RUN, "PASS")]
    return environment.get_template("report.html.j2").render(
        stamp=run.directory.name,
        passed=passed,
        sentence=sentence,
        facts=tables.head_lines(run),
        overview=overview,
        verdicts=[n for n in tables.OVERVIEW_VERDICTS if n == "PASS" or any(row.counts[n] for row in overview)],
        problems=_grouped(problems),
        problems_shown=PROBLEMS_SHOWN,
        plots={
            "rel_l2": Markup(plots.rel_l2_by_tensor(run.accuracy)),
            "used": Markup(plots.budget_used(run.accuracy)),
            "latency": Markup(plots.latency_bars(run.latency)),
        },
        accuracy=tables.accuracy_rows(run),
        accuracy_shown=ACCURACY_SHOWN,
        accuracy_columns=tables.ACCURACY_COLUMNS,
        latency=tables.latency_rows(run),
        latency_columns=tables.LATENCY_COLUMNS,
        checks=checks,
        check_families=sorted({record.family for record in checks}),
        colour_of=plots.colour_of,
        meter=_meter,
    )


@dataclass(frozen=True)
class Problem:
    """What did not pass of one case on one ISA, or one check: the worst verdict, a heading, lines, how to repeat it."""

    verdict: VerdictName
    where: str
    lines: tuple[str, ...]
    repro: str


def _grouped(records: Sequence[Result]) -> list[Problem]:
    """Problems in the order of their worst record; the tensors of a case stand together, they fail together."""
    groups: dict[str, list[Result]] = {}
    for record in records:
        groups.setdefault(_where(record), []).append(record)
    problems = []
    for where, members in groups.items():
        lines = [line for record in members for line in _lines(record)]
        if len(lines) > LINES_SHOWN:
            lines = [*lines[:LINES_SHOWN], f"and {len(lines) - LINES_SHOWN} more lines"]
        problems.append(Problem(members[0].verdict, where, tuple(lines), members[0].repro))
    return problems


def _where(record: Result) -> str:
    """Family, ISA and what was checked, for the heading of a problem."""
    if isinstance(record, AccuracyRecord):
        parallel = f"TP {record.tp}" if record.tp != 1 else ""
        parts = (record.family, record.isa, record.case, parallel)
    elif isinstance(record, LatencyRecord):
        parts = (record.family, record.isa, record.case, record.what)
    else:
        parts = (record.family, record.isa, record.name, "")
    return " · ".join(part for part in parts if part)


def _lines(record: Result) -> list[str]:
    """The message without the repro command, which stands below it."""
    return [line.rstrip() for line in record.message.splitlines() if line.strip() and line.strip() != record.repro]


def _meter(used: float) -> float:
    """Width of a meter in percent: full at the budget and beyond."""
    return 100.0 if math.isnan(used) or used > 1 else round(100 * used, 1)
