"""The pages of a run of the suites: accuracy.md, latency.md and report.html beside its records."""

from __future__ import annotations

import math

from ktverify.report import plots, tables
from ktverify.report.pages import render
from ktverify.report.problems import problems
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
    """report.html as text: the verdict first, every number on demand. Plots are inline SVG; a small script filters the
    long tables."""
    passed, sentence = tables.run_verdict(run)
    overview = tables.overview(run.records)
    return render(
        "report.html.j2",
        name=run.directory.name,
        word="PASS" if passed else "FAIL",
        verdict=sentence,
        facts=tables.head_lines(run),
        overview=tables.overview_grid(overview),
        meters=[_meter(row.worst.used) if row.worst is not None else None for row in overview],
        problems=problems(run),
        problems_shown=PROBLEMS_SHOWN,
        plots={
            "Error per tensor": plots.rel_l2_by_tensor(run.accuracy),
            "How much of the budget was used": plots.budget_used(run.accuracy),
        },
        latency_plot=plots.latency_bars(run.latency),
        latency=tables.latency_grid(run.latency),
        accuracy=tables.accuracy_grid(tables.accuracy_rows(run)),
        accuracy_shown=ACCURACY_SHOWN,
        checks=tables.checks_grid(run),
        families=sorted({record.family for record in run.checks}),
    )


def _meter(used: float) -> float:
    """Width of a meter in percent; 101 beyond the budget."""
    return 101.0 if math.isnan(used) or used > 1 else round(100 * used, 1)
