"""The command `gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktverify.cli.options import ReportsDir, RunName
from ktverify.system.files import reports_dir


def gate(
    run: RunName,
    baseline: Annotated[
        Path | None, typer.Option(help="compare with this baseline (default: reports/baseline.json, if it fits)")
    ] = None,
    write_baseline: Annotated[bool, typer.Option("--write-baseline", help="make this run the baseline")] = False,
    reports: ReportsDir = None,
) -> None:
    """Say what broke in a run, and exit 1 if anything did.

    Breaks: a verdict that is not PASS (SKIP and UNSUPPORTED only where the baseline passed), a run that checked nothing
    or did not finish, a check of the baseline that is missing, rel_l2 grown beyond the baseline by more than the factor
    in tolerances.toml. Times are never gated.

    \b
    Examples:  python -m ktverify gate latest
               python -m ktverify gate latest --baseline reports/baseline.json
               python -m ktverify gate latest --write-baseline
    """
    from ktverify.report import baseline as gating
    from ktverify.runs import store

    home = reports if reports is not None else reports_dir()
    found = store.load(store.find_run(run, home))
    usual = home / "baseline.json"
    if write_baseline:
        target = baseline if baseline is not None else usual
        written = gating.write_baseline(found, target)
        typer.echo(f"{target}: {len(written.checks)} checks of {found.directory.name}")
        return
    kept = None
    if baseline is not None:
        kept = gating.read_baseline(baseline)
    elif usual.is_file():
        kept = gating.read_baseline(usual)
        if found.head is not None and kept.engine != found.head.engine:
            typer.echo(f"not compared with {usual}: it is of engine {kept.engine}, this run of {found.head.engine}")
            kept = None
    finding = gating.judge_run(found, kept)
    against = f"against {kept.stamp}" if kept is not None else "without a baseline"
    broken = "" if finding.passed else f"{len(finding.breaks)} broke of "
    verdict = "PASS" if finding.passed else "FAIL"
    typer.echo(f"{verdict} {found.directory.name}: {broken}{finding.checked} checks, {against}")
    for line in finding.breaks:
        typer.echo(line)
    for line in finding.notes:
        typer.echo(f"note: {line}")
    if not finding.passed:
        raise typer.Exit(1)
