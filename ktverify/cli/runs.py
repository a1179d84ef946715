"""The commands about a run of the suites: `report`, `gate`, `confirm`. Light: heavy modules are imported inside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktverify.cli.options import ReportsDir, RunName
from ktverify.cli.progress import progress
from ktverify.system.files import reports_dir, write_whole

if TYPE_CHECKING:
    from ktverify.reproducer.confirm import Confirmation
    from ktverify.runs.store import Run

HEADINGS = ("confirmed", "case", "verdict", "tensor", "suite", "script")


def report(
    run: RunName = "latest",
    reports: ReportsDir = None,
    write: Annotated[
        bool, typer.Option("--write", help="write the run's pages again, also those of a killed run")
    ] = False,
) -> None:
    """Print a run: verdict, machine, what did not pass, times.

    The default is the newest run.

    \b
    Examples:  python -m ktverify report
               python -m ktverify report 20250131T0815
               python -m ktverify report path/to/run --write
    """
    from ktverify.report import console
    from ktverify.report.pages import write_run
    from ktverify.runs import store

    found = store.load(store.find_run(run, reports))
    if write:
        write_run(found)
    if not console.print_run(found):
        raise typer.Exit(1)


def gate(
    run: RunName,
    baseline: Annotated[
        Path | None, typer.Option(help="compare with this baseline (default: the engine's own in reports/)")
    ] = None,
    known_failures: Annotated[
        Path | None, typer.Option(metavar="FILE", help="what may fail, and must: a TOML file")
    ] = None,
    write_baseline: Annotated[bool, typer.Option("--write-baseline", help="make this run the baseline")] = False,
    update_known_failures: Annotated[
        bool, typer.Option("--update-known-failures", help="write what fails in this run into --known-failures")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="also in place of one with more checks")] = False,
    reports: ReportsDir = None,
) -> None:
    """Say what broke in a run, and exit 1 if anything did.

    Breaks: a verdict that is not PASS (SKIP and UNSUPPORTED only where the baseline passed), a run that checked nothing
    or did not finish, a check of the baseline that is missing, rel_l2 grown beyond the baseline by more than the factor
    in tolerances.toml. Checks that this machine or the run's command line leaves out are counted, no more. Times are
    never gated.

    Known failures do not break a run, and one that passes does: each entry of the file has a check and a reason, and
    may have cases, an instruction set, a verdict and a link. --update-known-failures writes the file.

    The native engine's baseline is reports/baseline.json, another engine's reports/baseline-ENGINE.json.

    \b
    Examples:  python -m ktverify gate latest
               python -m ktverify gate latest --baseline reports/baseline.json
               python -m ktverify gate latest --write-baseline
               python -m ktverify gate latest --known-failures known.toml
    """
    from ktverify.report import baseline as files
    from ktverify.report import gate as gating
    from ktverify.report import known_failures as knowing
    from ktverify.runs import store

    if update_known_failures and known_failures is None:
        raise ValueError("--update-known-failures: into which file? Name it by --known-failures FILE")
    home = reports if reports is not None else reports_dir()
    found = store.load(store.find_run(run, home))
    expected = None
    if known_failures is not None and not (update_known_failures and not known_failures.exists()):
        expected = knowing.read(known_failures)
    if update_known_failures and known_failures is not None:
        expected = knowing.updated(expected, found)
        knowing.write(expected, known_failures)
        unexplained = sum(entry.reason == knowing.UNEXPLAINED for entry in expected.entries)
        typer.echo(f"{known_failures}: {len(expected.entries)} entries, {unexplained} of them {knowing.UNEXPLAINED}")
        return
    usual = files.path_for(found.head.engine if found.head is not None else "", home)
    if write_baseline:
        target = baseline if baseline is not None else usual
        written = gating.write_baseline(found, target, force=force, known_failures=expected)
        typer.echo(f"{target}: {len(written.checks)} checks of {found.directory.name}")
        return
    kept = None
    if baseline is not None:
        kept = files.read(baseline)
    elif usual.is_file():
        kept = files.read(usual)
    if kept is not None and baseline is None and found.head is not None and kept.engine != found.head.engine:
        typer.echo(f"not compared with {usual}: it is of engine {kept.engine}, this run of {found.head.engine}")
        kept = None
    finding = gating.judge_run(found, kept, known_failures=expected)
    against = f"against the baseline of {kept.stamp} ({kept.cpu})" if kept is not None else "without a baseline"
    broken = "" if finding.passed else f"{len(finding.breaks)} broke of "
    failing = f", {finding.known} of them known failures" if expected is not None else ""
    verdict = "PASS" if finding.passed else "FAIL"
    typer.echo(f"{verdict} {found.directory.name}: {broken}{finding.checked} checks{failing}, {against}")
    for line in finding.breaks:
        typer.echo(line)
    for line in finding.notes:
        typer.echo(f"note: {line}")
    if not finding.passed:
        raise typer.Exit(1)


def confirm(
    run: RunName = "latest",
    reports: ReportsDir = None,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="for one case", min=1)] = 60.0,
) -> None:
    """Check the claims of a run against its engine again, without the suite.

    Exit code 1 if a claim is refuted; 2 if only scripts that could not be run leave one unconfirmed.

    Every case that is FAIL, CRASH or TIMEOUT is written as a folder of its inputs, the expected values and the
    engine's own script, and run in the engine's interpreter. The folders stay in the run's directory, below confirm/.

    \b
    Examples:  python -m ktverify confirm
               python -m ktverify confirm 20250131T0815 --time-limit 300
    """
    from ktverify.reproducer.confirm import FOLDER
    from ktverify.reproducer.confirm import confirm as repeat
    from ktverify.runs import store

    found = store.load(store.find_run(run, reports))
    with progress("confirm") as say:
        confirmations = repeat(
            found, time_limit=time_limit, done=lambda number, of: say(f"{number} of {of} cases are done")
        )
    text = _text(found, confirmations)
    write_whole(found.directory / FOLDER / "confirm.md", text)
    typer.echo(text, nl=False)
    bad = [each for each in confirmations if not each.confirmed]
    if bad:
        raise typer.Exit(1 if any(each.ran for each in bad) else 2)


def _text(run: Run, confirmations: Sequence[Confirmation]) -> str:
    """Verdict first, then the table, with the unconfirmed claims on top."""
    from ktverify.report.grid import Grid, markdown_table
    from ktverify.reproducer.confirm import FOLDER, without_claim
    from ktverify.spec.cases import Case

    assert run.head is not None
    cases = len({each.claim.where for each in confirmations})
    bad = sum(not each.confirmed for each in confirmations)
    broken = sum(not each.ran for each in confirmations)
    left = without_claim(run.records)
    memory = [record for record in run.records if record.verdict == "OOM"]
    if not confirmations and left:
        verdict = f"Nothing was confirmed: a script can show none of the {left} failures of {run.directory.name}."
    elif not confirmations:
        verdict = f"Nothing to confirm: {run.directory.name} says nothing against {run.head.engine}."
    elif bad:
        verdict = f"NOT CONFIRMED: {bad} of {len(confirmations)} claims, in {cases} cases of {run.head.engine}."
        if broken:
            verdict += f" Of {broken} of them nothing is known: the engine's script could not be run."
    else:
        verdict = f"CONFIRMED: all {len(confirmations)} claims, in {cases} cases of {run.head.engine}."
    parts = [verdict]
    if confirmations:
        rows = []
        # wrong numbers before crashes and timeouts
        for each in sorted(confirmations, key=lambda each: (each.confirmed, each.claim.verdict != "FAIL")):
            word, claim = "yes" if each.confirmed else "NO" if each.ran else "?", each.claim
            rows.append((word, str(claim.where), claim.verdict, claim.tensor, claim.suite, each.script))
        parts.append(markdown_table(Grid("", (), HEADINGS, tuple(rows), left=HEADINGS)))
        parts.append(f"To repeat one: the engine's Python, and {os.path.relpath(run.directory)}/{FOLDER}/CASE/run.py")
    if left > len(memory):
        parts.append(f"Not of one case's forward and backward, and not repeated here: {left - len(memory)} checks.")
    if memory:
        names = ", ".join(dict.fromkeys(Case.parse(record.case).brief if record.case else "" for record in memory))
        where = f" of {names}" if names else ""
        again = f" The numbers, without a limit: {memory[0].repro}" if memory[0].repro else ""
        parts.append(
            f"OOM, and not repeated here because a script has no memory limit: {len(memory)} records{where}. They show "
            f"nothing about the numbers. Each says which call took how much, and what the limit was.{again}"
        )
    return "\n\n".join(parts) + "\n"
