"""The command line: thin. Every command parses its arguments, calls the module that does the work, and prints.

Comes in: arguments. Goes out: text and an exit code: 0 all passed, 1 something did not pass, 2 the command could not be
carried out (one line says why), 130 it was stopped by Ctrl-C. Heavy modules are imported inside the commands, so that
`--help` is there at once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from ktverify.cli.bench import bench_app
from ktverify.cli.confirm import confirm
from ktverify.cli.diagnose import DEBUG, diagnose
from ktverify.cli.options import EngineName
from ktverify.cli.power import clean, mutants
from ktverify.cli.profile import profile
from ktverify.cli.training import COMMANDS as TRAINING_COMMANDS
from ktverify.isolation.interrupt import in_one_line
from ktverify.system.paths import reports_dir

P = ParamSpec("P")
R = TypeVar("R")


class OwnProgram:
    """The context object of a command that is a program by itself, so that it may fork; see isolation/forked.py."""


app = typer.Typer(
    name="ktverify",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

# what users can cause: wrong arguments, missing files, an engine that refuses. Anything else is a bug and shows itself
_EXPECTED_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, OSError, MemoryError, ImportError)
_state = {"traceback": False}
_TIME_LIMIT = typer.Option(metavar="SECONDS", help="for one call of the engine; then say where it hangs", min=1)


def _one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an expected error into one line on stderr and exit code 2, Ctrl-C into another and 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with in_one_line():
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # whoever read has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except _EXPECTED_ERRORS as error:
            if _state["traceback"]:
                raise
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            line = " ".join(str(text).split()) or type(error).__name__
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(2) from None

    return wrapped


def _version(wanted: bool) -> None:
    if wanted:
        import ktverify

        typer.echo(f"ktverify {ktverify.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    traceback: Annotated[bool, typer.Option("--traceback", help="show where an error was raised")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Check that a CPU Mixture-of-Experts layer with LoRA computes the right outputs and gradients, and how fast.

    \b
    First:      python -m ktverify doctor            what runs on this machine
    The suite:  pytest suites/ -n 4                  everything; writes reports/runs/<stamp>/
    After it:   python -m ktverify report            the last run's summary
                python -m ktverify gate latest       exit code 1 if anything broke
                python -m ktverify confirm           its accusations again, without the suite
    One case:   python -m ktverify repro small

    Exit codes: 0 passed, 1 something did not pass, 2 the command could not be carried out.
    """
    _state["traceback"] = traceback


@app.command()
@_one_line_errors
def doctor() -> None:
    """What will run on this machine, what won't, and why.

    \b
    ok    runs
    no    will not run; the line says what is missing
    note  runs, but is worth knowing

    Exit code 1 if the suites cannot run on the native engine at all.

    \b
    Example:  python -m ktverify doctor
    """
    from rich.text import Text

    from ktverify.cli import doctor as examination
    from ktverify.report.console import make_console

    console = make_console()
    styles = {"ok": "green", "no": "bold red", "note": "yellow"}
    stopped = False
    for line in examination.examine():
        console.print(
            Text.assemble((line.state.ljust(6), styles[line.state]), (line.name.ljust(16), "bold"), line.text)
        )
        stopped = stopped or (line.needed and line.state == "no")
    if stopped:
        raise typer.Exit(1)


@app.command("list")
@_one_line_errors
def list_cases(
    cases: Annotated[str | None, typer.Argument(metavar="GLOB", help="only names that match, like 'qwen*'")] = None,
    tier: Annotated[str | None, typer.Option(help="only one tier: default, big or full")] = None,
    data: Annotated[str | None, typer.Option(help="only one kind of data, like gaussian or integer")] = None,
    cost: Annotated[bool, typer.Option("--cost", help="arithmetic and weights instead of data and reasons")] = False,
    engines: Annotated[bool, typer.Option("--engines", help="list the engines instead")] = False,
) -> None:
    """The cases: sizes, data, routing, and why each exists.

    E experts, k per token, H hidden, I intermediate, T tokens, r LoRA rank.

    \b
    Examples:  python -m ktverify list
               python -m ktverify list 'deepseek*' --cost
               python -m ktverify list --engines
    """
    if engines:
        from ktverify.engines.registry import OWN, names

        for name in names():
            typer.echo(name)
        typer.echo(f"{OWN}: any callable that takes KTMoEWrapper's arguments")
        return
    from ktverify.cli.list import print_cases
    from ktverify.spec.cases import DATA_KINDS, TIERS, select

    _check_choice("--tier", tier, TIERS)
    _check_choice("--data", data, tuple(DATA_KINDS))
    chosen = select(cases, tier=tier, data=data)
    if not chosen:
        raise ValueError(f"no case matches {cases!r} with these options; `python -m ktverify list` shows all")
    print_cases(chosen, cost=cost)


@app.command()
@_one_line_errors
def repro(
    context: typer.Context,
    case: Annotated[str, typer.Argument(metavar="CASE", help="a name, name@seed=5, name,T=1, or E=8,k=2,H=64,…")],
    engine: EngineName = "native",
    isa: Annotated[str | None, typer.Option(help="force an instruction set; refused where it cannot run")] = None,
    tensor: Annotated[list[str] | None, typer.Option(help="only this tensor; may be given again")] = None,
    tp: Annotated[int, typer.Option(help="tensor-parallel degree", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="at most so many threads", min=1)] = None,
    method: Annotated[str, typer.Option(help="AMXBF16_SFT or AMXBF16_SFT_SkipLoRA")] = "AMXBF16_SFT",
    fresh: Annotated[bool, typer.Option("--fresh", help="compare with the live oracle, not with the golden")] = False,
    dump: Annotated[Path | None, typer.Option(help="save inputs, actual and expected as safetensors")] = None,
    stand_alone: Annotated[
        Path | None,
        typer.Option("--stand-alone", metavar="DIR", help="write a folder that repeats it without ktverify"),
    ] = None,
    time_limit: Annotated[float, _TIME_LIMIT] = 900,
) -> None:
    """Run one case and say for every tensor what its gates said.

    CASE is printed by every failing check, so its command line can be pasted. A changed or hand-written case, or
    another seed, is compared with the oracle, computed live.

    \b
    Examples:  python -m ktverify repro small
               python -m ktverify repro 'small,T=1@seed=3' --isa scalar --tensor grad_up_lora_a
               python -m ktverify repro 'E=8,k=2,H=64,I=96,T=33,r=4' --engine torch_bf16
               python -m ktverify repro small --fresh --dump small.safetensors
               python -m ktverify repro small --engine kt_kernel --stand-alone small
    """
    from ktverify.checks import accuracy as checking
    from ktverify.checks.problem import Problem, Result, source_of
    from ktverify.checks.target import Target
    from ktverify.cli.verify import Found, Part, Question, judged
    from ktverify.diagnose.hook import add_cause
    from ktverify.engines.run import METHOD
    from ktverify.reproducer import bundle
    from ktverify.spec.cases import Case

    parsed = Case.parse(case)
    wanted = checking.check_names(tensor, backward=True)
    kept: list[Result] = []
    target = Target(engine, isa, tp, threads, method)

    def script() -> Found:
        bundle.script_of(engine)
        return [], []

    def run() -> Found:
        result = checking.check_case(target, parsed, fresh=fresh, backward=tensor != ["output"], tensors=tensor)
        if method == METHOD:
            add_cause(result, target)
        kept.append(result)
        return result.records, []

    def write() -> Found:
        # in a new process, where the engine has ended the other
        result = kept[0] if kept else Result(Problem.of(parsed, fresh=fresh, method=method))
        written = []
        if dump is not None:
            written.append(f"{len(checking.dump(result, str(dump)))} tensors in {dump}")
        if stand_alone is not None:
            script = bundle.write_result(result, target, stand_alone)
            written.append(f"{script}: run it with a Python that has {engine}")
        return [], written

    question = Question(target, parsed, fresh, time_limit, isinstance(context.obj, OwnProgram))
    source = source_of(parsed, fresh=fresh, method=method)
    todo = [Part(run, f"{parsed.id} on {engine}", wanted, tp, source)]
    if stand_alone is not None:
        # first: where there is no script, nothing need be computed
        todo.insert(0, Part(script, f"the stand-alone script of {engine}", ()))
    if dump is not None or stand_alone is not None:
        todo.append(Part(write, "writing", ()))
    records, written = judged(question, todo)
    typer.echo(f"{parsed.id}: {parsed.why}")
    parts = [f"engine {engine}", f"ISA {records[0].isa or 'its own choice'}", f"TP {tp}"]
    if any(record.gates for record in records):
        parts.append("compared with " + ("the golden" if records[0].source == "golden" else "the live oracle"))
    typer.echo(", ".join(parts))
    told = [(record.message, "" if record.verdict == "PASS" else f"    {record.repro}") for record in records]
    for message, again in dict.fromkeys(told):  # what no tensor came of is one thing
        typer.echo(message)
        if again:
            typer.echo(again)
    for line in written:
        typer.echo(line)
    if any(record.verdict != "PASS" for record in records):
        raise typer.Exit(1)


@app.command()
@_one_line_errors
def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="latest, a stamp or its beginning, or a directory")
    ] = "latest",
    reports: Annotated[Path | None, typer.Option(help="where the runs are (default: reports/ of the checkout)")] = None,
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
    from ktverify.report.run_pages import write_run
    from ktverify.runs import store

    found = store.load(store.find_run(run, reports))
    if write:
        write_run(found)
    if not console.print_run(found):
        raise typer.Exit(1)


@app.command()
@_one_line_errors
def gate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="latest, a stamp or its beginning, or a directory")],
    baseline: Annotated[
        Path | None, typer.Option(help="compare with this baseline (default: reports/baseline.json, if it fits)")
    ] = None,
    write_baseline: Annotated[bool, typer.Option("--write-baseline", help="make this run the baseline")] = False,
    reports: Annotated[Path | None, typer.Option(help="where the runs are (default: reports/ of the checkout)")] = None,
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
    finding = gating.judge_run(found, kept, gating.growth() if kept is not None else None)
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


@app.command()
@_one_line_errors
def verify(
    context: typer.Context,
    mode: Annotated[str, typer.Option(help="forward, backward, training or all")] = "all",
    method: Annotated[str, typer.Option(help="AMXBF16_SFT or AMXBF16_SFT_SkipLoRA")] = "AMXBF16_SFT",
    tp: Annotated[str, typer.Option(help="no-tp, tp (every degree above 1 that the case has) or all")] = "no-tp",
    case: Annotated[str | None, typer.Option(help="a case as repro takes it (default: a Qwen3-30B-A3B shape)")] = None,
    engine: EngineName = "native",
    isa: Annotated[str | None, typer.Option(help="force an instruction set; refused where it cannot run")] = None,
    threads: Annotated[int | None, typer.Option(help="at most so many threads", min=1)] = None,
    fresh: Annotated[int | None, typer.Option(metavar="SEED", help="draw new inputs from this seed")] = None,
    steps: Annotated[int, typer.Option(help="training steps", min=2)] = 10,
    time_limit: Annotated[float, _TIME_LIMIT] = 900,
) -> None:
    """Verify one engine without pytest: inputs, oracle, gates, one table.

    forward compares the output, backward every gradient; training takes optimizer steps (AdamW) and compares every
    step with the oracle on the same parameters, and the loss must fall.

    \b
    Examples:  python -m ktverify verify
               python -m ktverify verify --mode forward --method AMXBF16_SFT --tp no-tp
               python -m ktverify verify --mode all --tp all --case deepseek_v3_t4
               python -m ktverify verify --mode training --engine my_package.layer:make_layer
    """
    from ktverify.checks import accuracy as checking
    from ktverify.checks.target import Target
    from ktverify.cli import verify as verifying
    from ktverify.engines.run import METHOD
    from ktverify.spec.cases import Case

    _check_choice("--mode", mode, verifying.MODES)
    _check_choice("--method", method, checking.METHODS)
    parsed = Case.parse(case or verifying.DEFAULT_CASE)
    if fresh is not None:
        parsed = parsed.with_seed(fresh)
    degrees = verifying.tp_degrees(parsed, tp)
    if mode == "training" and method != METHOD:
        raise ValueError(f"--mode training steps the LoRA parameters, which {method} has no gradients for")
    target = Target(engine, isa, threads=threads, method=method)
    question = verifying.Question(target, parsed, fresh is not None, time_limit, isinstance(context.obj, OwnProgram))
    typer.echo(f"{parsed.id}: {parsed.why}")
    parts = verifying.parts_of_calls(question, degrees, mode) if mode != "training" else []
    if mode in ("training", "all") and method == METHOD:
        parts += verifying.parts_of_training(question, degrees, steps)
    verifying.conclude(*verifying.judged(question, parts))


def _check_choice(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{option} is {value!r}, it takes one of {', '.join(allowed)}")


for _command in (mutants, clean, diagnose, confirm, profile):
    app.command()(_one_line_errors(_command))
_debug = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at one thing closely: nan, gradients, tp.")
for _name, _look in DEBUG.items():
    _debug.command(_name)(_one_line_errors(_look))
app.add_typer(_debug, name="debug")
for _name, (_command, _settings) in TRAINING_COMMANDS.items():
    _checked: Callable[..., None] = _one_line_errors(_command)
    app.command(_name, context_settings=_settings)(_checked)
app.add_typer(bench_app(_one_line_errors), name="bench")


def main() -> None:
    """Entry point of `ktverify` and `python -m ktverify`."""
    app(obj=OwnProgram(), prog_name="python -m ktverify" if sys.argv[0].endswith("__main__.py") else "ktverify")
