"""The command line: each command parses its arguments, calls the module that does the work, and prints.

Exit codes: 0 passed, 1 something did not pass, 2 the command could not be carried out (one line states why), 130
stopped by Ctrl-C. The modules of the commands are light: they import torch inside the command, so that `--help` is
quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ktverify.cli.bench_c2c import C2C, C2C_HELP, analyze
from ktverify.cli.bench_kernels import kernels
from ktverify.cli.bench_layer import layer, profile, sweep
from ktverify.cli.bench_shapes import bench
from ktverify.cli.bench_transformer import memory, transformer
from ktverify.cli.diagnose import DEBUG, diagnose
from ktverify.cli.doctor import doctor
from ktverify.cli.fuzz import fuzz
from ktverify.cli.init_engine import init_engine
from ktverify.cli.list import list_cases
from ktverify.cli.llamafactory import llamafactory
from ktverify.cli.mutants import clean, mutants
from ktverify.cli.options import (
    PROGRAM,
    TRACEBACK,
    CommandGroup,
    OneLineErrors,
    OwnProgram,
    say_error,
    with_checked_arguments,
)
from ktverify.cli.plan import plan
from ktverify.cli.replay import replay
from ktverify.cli.run import run
from ktverify.cli.runs import confirm, gate, report
from ktverify.cli.scoreboard import scoreboard
from ktverify.cli.training import COMMANDS as TRAINING_COMMANDS
from ktverify.cli.training import PASS_THROUGH
from ktverify.cli.verify import repro, verify
from ktverify.system import limits
from ktverify.system.files import in_words, search_in

app = typer.Typer(name="ktverify", cls=OneLineErrors, **PROGRAM)


def _version(wanted: bool) -> None:
    if wanted:
        import ktverify

        typer.echo(f"ktverify {ktverify.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar=TRACEBACK, show_envvar=False, help="show where an error was raised")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Check that a CPU Mixture-of-Experts layer with LoRA computes the right outputs and gradients, and how fast.

    \b
    First:      python -m ktverify doctor            what runs on this machine
    The suite:  pytest --pyargs ktverify.suites -n 4 everything; writes reports/runs/<stamp>/
                pytest suites/ -n 4                  the same in a clone
    After it:   python -m ktverify report            the last run's summary
                python -m ktverify gate latest       exit code 1 if anything broke
                python -m ktverify confirm           its claims again, without the suite
    One case:   python -m ktverify repro small

    Exit codes: 0 passed, 1 something did not pass, 2 the command could not be carried out.
    """
    limits.limit_libraries()
    # a script's own folder is on the path, the current one is not
    search_in(Path.cwd())


class DefaultGroup(CommandGroup):
    """A group whose first argument is BENCH_DEFAULT if it is left out: `bench --list` means `bench shapes --list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first not in self.commands and first not in ctx.help_option_names:
            args = [BENCH_DEFAULT, *args]
        return super().parse_args(ctx, args)


def _group(help_text: str, commands: dict[str, Callable[..., None]], **settings: Any) -> typer.Typer:
    group = typer.Typer(rich_markup_mode=None, help=help_text, **{"cls": CommandGroup, **settings})
    for name, command in commands.items():
        group.command(name)(with_checked_arguments(command))
    return group


BENCH_DEFAULT = "shapes"
BENCH: dict[str, Callable[..., None]] = {
    BENCH_DEFAULT: bench,
    **{command.__name__: command for command in (layer, sweep, kernels, transformer, memory, analyze)},
}
BENCH_HELP = """\
Time a layer, a transformer or a pipeline, or count memory. docs/profile.md and docs/c2c.md show each view.

\b
python -m ktverify bench [SHAPE]...         the engine beside its peers; options: bench shapes --help
python -m ktverify bench layer [CASE]       one layer: forward, backward, tensor parallelism, memory
python -m ktverify bench sweep [WHAT]...    its cost over qlen, rank, threads, experts
python -m ktverify bench kernels            the kernels' constants against alternatives
python -m ktverify bench transformer small  forward and backward of a transformer
python -m ktverify bench memory 2.7b        what a training step of a transformer takes
python -m ktverify bench c2c single         a pipeline of two models: single, batch, dataset, merge
python -m ktverify bench analyze FILE...    what `bench c2c` wrote: distribution, slowest prompts, CSV
"""

_COMMANDS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "doctor": (doctor, {}),
    "list": (list_cases, {}),
    "init-engine": (init_engine, {}),
    **{command.__name__: (command, {}) for command in (repro, replay, report, gate, scoreboard, verify)},
    **{command.__name__: (command, {}) for command in (mutants, clean, fuzz, diagnose, confirm, profile)},
    "plan": (plan, {}),
    **TRAINING_COMMANDS,
    "llamafactory": (llamafactory, PASS_THROUGH),
    "run": (run, {**PASS_THROUGH, "allow_interspersed_args": False}),
}
for _name, (_command, _settings) in _COMMANDS.items():
    app.command(_name, context_settings=_settings)(with_checked_arguments(_command))
app.add_typer(_group("Look at one thing closely: nan, gradients, tp.", DEBUG, no_args_is_help=True), name="debug")
# the commands below `bench` take --batch_sizes for --batch-sizes
_hyphens = {**PROGRAM["context_settings"], "token_normalize_func": lambda name: name.replace("_", "-")}
_bench = _group(BENCH_HELP, BENCH, cls=DefaultGroup, context_settings=_hyphens)
_bench.add_typer(_group(C2C_HELP, C2C, no_args_is_help=True, context_settings=_hyphens), name="c2c")
app.add_typer(_bench, name="bench")


def main() -> None:
    """Entry point of `ktverify` and `python -m ktverify`."""
    try:
        app(obj=OwnProgram(), prog_name="python -m ktverify" if sys.argv[0].endswith("__main__.py") else "ktverify")
    except OSError as error:  # standard output takes no more
        say_error(in_words(error))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
