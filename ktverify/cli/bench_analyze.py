"""`python -m ktverify bench analyze`: reads what `bench c2c` wrote, prints, draws. Light: help needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ktverify.cli.bench_options import Json, named


def analyze(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="files of records, NAME.jsonl")],
    out: Annotated[Path | None, named("out", "the folder to write into (default: the first file's)")] = None,
    as_json: Json = False,
) -> None:
    """How the times of many prompts are distributed: the slowest ten, histograms, CSV.

    Written: NAME.analysis.csv (a row a prompt), NAME.analysis.png, NAME.analysis.md, named after the first file. A last
    line that was cut off is left out.

    \b
    Examples:  python -m ktverify bench analyze timing.jsonl
               python -m ktverify bench analyze part1.jsonl part2.jsonl --out analysis
    """
    from dataclasses import asdict

    from ktverify.bench.c2c import store, views
    from ktverify.report.console import make_console, print_grids
    from ktverify.report.grid import markdown
    from ktverify.system.files import write_whole

    records = [record for path in files for record in store.read_records(path)]
    if not records:
        raise ValueError(f"{', '.join(map(str, files))}: there is no whole record")
    slowest = views.slowest(records)
    grids = [
        views.distribution_grid(records, store.notes(files)),
        views.prompts_grid(f"the slowest {len(slowest)}", slowest),
    ]
    home = files[0].parent if out is None else out
    stem = home / files[0].name
    files_of: dict[str, str | bytes] = {
        ".analysis.csv": views.prompt_table(records, ","),
        ".analysis.md": "\n\n".join(map(markdown, grids)) + "\n",
        ".analysis.png": views.draw_histogram(records),
    }
    written = [write_whole(store.beside(stem, ending), content) for ending, content in files_of.items()]
    if not as_json:
        print_grids(make_console(), grids, written)
        return
    found = {
        "records": len(records),
        "statistics": {name: asdict(statistics) for name, statistics in views.distribution(records).items()},
        "slowest": [{"id": record.id, "total_ms": record.timing.total_ms} for record in slowest],
        "written": [str(path) for path in written],
    }
    typer.echo(json.dumps(found))
