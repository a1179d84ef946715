"""The commands `mutants` and `clean`: what the suite finds, and that it invents nothing. Both run in a checkout.

The suites do the work, in a process of their own, for nothing here may import them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

_ROOT = Path(__file__).resolve().parents[1]


def mutants(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="only these; default: all")] = None,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    json: Annotated[
        Path | None, typer.Option(help="where to write the whole table (default for all: reports/mutants.json)")
    ] = None,
) -> None:
    """Judge engines that are wrong in one way each by the default tier's checks. Exit code 1 if one lives.

    Says which check kills which, how far over which gate's budget, and which mutants each gate alone kills.

    \b
    Examples:  python -m ktverify mutants
               python -m ktverify mutants lora_scale_one tp_part_lost
    """
    target = json if json is not None or names else _ROOT / "reports" / "mutants.json"
    arguments = [*(names or []), "--jobs", str(jobs), *(["--json", str(target.resolve())] if target else [])]
    _in_checkout("suites.meta.mutants", arguments)


def clean(
    runs: Annotated[int, typer.Option(help="how many; each is one engine, instruction set and seed", min=1)] = 200,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    cases: Annotated[str | None, typer.Option(metavar="GLOB", help="only the small default cases that match")] = None,
) -> None:
    """Judge right engines on new inputs. Exit code 1 if anything fails.

    \b
    Example:  python -m ktverify clean --runs 200
    """
    chosen = ["--cases", cases] if cases is not None else []
    _in_checkout("suites.meta.clean", ["--runs", str(runs), "--jobs", str(jobs), *chosen])


def _in_checkout(module: str, arguments: list[str]) -> None:
    """Run `module` with the checkout as its directory; its exit code. RuntimeError where there is no checkout."""
    if not (_ROOT / "suites" / "meta").is_dir():
        raise RuntimeError(f"this command needs a clone of the repository: there is no suites/ beside {_ROOT.name}/")
    # what multiprocessing says about workers that were ended is for nobody
    quiet = ["-W", "ignore::UserWarning:multiprocessing.resource_tracker"]
    command = [sys.executable, *quiet, "-m", module, *arguments]
    # a session of its own, so that Ctrl-C reaches this process alone, which ends all of the others
    process = subprocess.Popen(command, cwd=_ROOT, start_new_session=True)
    # a terminated run ends like an interrupted one
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise typer.Exit(code)
