"""The pages of a run of the suites: accuracy.md, latency.md and report.html beside its records.

report.html is complete in itself: the verdict first, every number on demand. Plots are inline SVG; style and the one
small script (it filters the long tables) are in the page; its content policy forbids the browser to load anything.
"""

from __future__ import annotations

import math
from pathlib import Path

from ktverify.report import plots, tables
from ktverify.report.problems import problems
from ktverify.runs.record import CheckRecord, worst_first
from ktverify.runs.store import Run, write_records
from ktverify.system.files import write_whole

PROBLEMS_SHOWN = 8
ACCURACY_SHOWN = 15


def write_run(run: Run) -> None:
    """Write records.jsonl and every page of `run` into its directory, each file whole."""
    write_records(run)
    write_whole(run.directory / "accuracy.md", tables.accuracy_markdown(run))
    write_whole(run.directory / "latency.md", tables.latency_markdown(run))
    write_whole(run.directory / "report.html", page(run))


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
    return environment.get_template("report.html.j2").render(
        stamp=run.directory.name,
        passed=passed,
        sentence=sentence,
        facts=tables.head_lines(run),
        overview=overview,
        verdicts=[n for n in tables.OVERVIEW_VERDICTS if n == "PASS" or any(row.counts[n] for row in overview)],
        problems=problems(run),
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
        no_isa=tables.NO_ISA,
        meter=_meter,
    )


def _meter(used: float) -> float:
    """Width of a meter in percent: full at the budget and beyond."""
    return 100.0 if math.isnan(used) or used > 1 else round(100 * used, 1)
