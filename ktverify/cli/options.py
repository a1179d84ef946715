"""Options that several commands take, and the one door of their errors. Light: help needs no torch."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ktverify.engines import registry
from ktverify.errors import is_expected, one_line
from ktverify.isolation.hosted import absolute
from ktverify.isolation.interrupt import in_one_line
from ktverify.isolation.origin import describe, of_an_outside_engine
from ktverify.system.files import expand, in_words, install_command
from ktverify.system.limits import LARGEST_NUMBER
from ktverify.system.printable import shown_line


def named(name: str, text: str, **more: Any) -> typer.models.OptionInfo:
    """An option with underscores, like --max_new_tokens; `bench` takes --max-new-tokens for the same."""
    found: typer.models.OptionInfo = typer.Option(f"--{name}", help=text, **more)
    return found


def with_checked_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with ~ and $VARIABLE replaced in every argument that is a Path: a shell leaves them in --out=~/x.

    ValueError for a number that is not finite, or larger than any use."""

    @functools.wraps(command)
    def call(**arguments: Any) -> None:
        for name, value in arguments.items():
            if isinstance(value, float) and not abs(value) <= LARGEST_NUMBER:
                what = f"a finite number, at most {LARGEST_NUMBER:.0e}"
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it takes {what}")
        command(**{name: _expanded(value) for name, value in arguments.items()})

    return call


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return Path(expand(str(value))) if isinstance(value, Path) else value


def expanded(text: str | None) -> str | None:
    """The callback of an option that is a path or a name: ~ and $VARIABLE are replaced."""
    return text if text is None else expand(text)


EngineName = Annotated[str, typer.Option(help=f"engine name, {registry.OWN}", callback=lambda name: absolute(name))]
CaseText = Annotated[str, typer.Argument(metavar="CASE", help="a name, name@seed=5, name,T=1, or E=8,k=2,H=64,…")]
SomeCase = Annotated[str, typer.Argument(metavar="CASE", help="a case as repro takes it")]
CaseOrMutants = Annotated[
    list[str] | None, typer.Argument(metavar="CASE", help="a case as repro takes it; with --mutants their names")
]
Tensors = Annotated[list[str] | None, typer.Option(help="only this tensor; may be given again")]
Isa = Annotated[str | None, typer.Option(help="force an instruction set; refused where it cannot run")]
Tp = Annotated[int, typer.Option(help="tensor-parallel degree", min=1)]
Threads = Annotated[int | None, typer.Option(help="at most so many threads", min=1)]
Method = Annotated[str, typer.Option(help="AMXBF16_SFT or AMXBF16_SFT_SkipLoRA")]
TimeLimit = Annotated[
    float, typer.Option(metavar="SECONDS", help="for one call of the engine; then say where it hangs", min=1)
]
CallTimeLimit = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="for one call or check (default: the suites' 300)", min=1)
]
CallMemoryLimit = Annotated[
    float | None, typer.Option(metavar="GIB", help="for one process (default: the suites' 3)", min=0.1)
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="latest, a stamp or its beginning, or a directory", callback=expanded)
]
ReportsDir = Annotated[Path | None, typer.Option(help="where the runs are (default: reports/ of the checkout)")]

# ---- of the commands that measure

Out = Annotated[Path | None, typer.Option(help="the folder to write into (default: a new one in reports/runs)")]
Show = Annotated[Path | None, typer.Option(help="measure nothing: print and draw this earlier run again")]
Lines = Annotated[bool, typer.Option("--json", help="print the JSON lines instead of the tables")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object instead of tables")]

# ---- of `bench transformer` and `bench memory`

Preset = Annotated[str, typer.Argument(metavar="PRESET", help="small, medium, large, xl or 2.7b")]
ContextLength = Annotated[int, named("context_length", "tokens of a sequence", min=1)]
BatchSize = Annotated[int, named("batch_size", "sequences", min=1)]
VocabSize = Annotated[int, named("vocab_size", "rows of the embedding and of the output head", min=1)]
DModel = Annotated[int | None, named("d_model", "width (default: the preset's, as all sizes)", min=1)]
DFf = Annotated[int | None, named("d_ff", "width inside SwiGLU", min=1)]
NumLayers = Annotated[int | None, named("num_layers", "layers", min=1)]
NumHeads = Annotated[int | None, named("num_heads", "attention heads", min=1)]
ModelDtype = Annotated[str, named("dtype", "float32 or bfloat16")]
Attention = Annotated[str, named("attention", "plain writes the scores out; fused is torch's own")]

# the fields of ModelSize among them
SIZES = (
    "context_length", "batch_size", "d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "rope_theta", "dtype",
    "attention",
)  # fmt: skip

# ---- of `bench c2c single`, `batch` and `dataset`

# the pair of models that the pipeline was made for
BASE, TEACHER = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Base"
BaseModel = Annotated[str, named("base_model", "the model that answers: a directory or a hub's name")]
TeacherModel = Annotated[str, named("teacher_model", "the model whose cache it receives")]
ProjectorFile = Annotated[
    Path | None, named("projectors", "a safetensors file of projectors (default: the identity on the base)")
]
MaxNewTokens = Annotated[int, named("max_new_tokens", "tokens of a response at most", min=1)]
Warmup = Annotated[int, named("warmup_steps", "short runs of the first prompt, which do not count", min=0)]
PairDtype = Annotated[str, named("dtype", "of both models: bfloat16 or float32")]
Device = Annotated[str, named("device", "of both models: cpu or cuda")]
Template = Annotated[bool, typer.Option("--template/--no-template", help="put prompts into the chat templates")]
Output = Annotated[
    Path | None, named("output", "the file of records, NAME.jsonl (default: reports/runs/<stamp>-c2c/timing.jsonl)")
]


# of the two programs, `ktverify` and `ktverify.golden`
PROGRAM: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 110},
}


TRACEBACK = "KTVERIFY_TRACEBACK"  # the variable that does the same as --traceback, also below a launcher


def say_error(text: str) -> None:
    """Print the one line of an error on stderr: "error: " and the text."""
    typer.echo(f"error: {shown_line(text)}", err=True)


class CommandGroup(TyperGroup):
    """A group of commands whose help cuts no sentence short; a wrong command line is one line and exit code 2."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands, with the whole first sentence of each."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, one.get_short_help_str(10_000)) for name, one in commands.items() if one and not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(self, args: Any = None, *, standalone_mode: bool = True, **named: Any) -> Any:  # type: ignore[override]
        """Run the program."""
        for stream in (sys.stdout, sys.stderr):
            # a file's name may contain what the terminal's encoding has not
            getattr(stream, "reconfigure", lambda errors: None)(errors="backslashreplace")
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **named)
        try:
            code = super().main(args, standalone_mode=False, **named)
        except typer.Abort:
            code = 1
        except _WrongCommandLine as wrong:
            text, context = wrong.format_message().rstrip("."), wrong.ctx  # type: ignore[attr-defined]
            if text.startswith("Usage:"):  # a group without a command: its help
                typer.echo(text, err=True)
            else:
                see = f"{context.command_path} --help" if context else "--help"
                say_error(f"{text[:1].lower()}{text[1:]}; see {see}")
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


# modules of packages that the core does not require -> the extra of pyproject.toml that installs them
_EXTRAS = {
    **dict.fromkeys(("accelerate", "peft", "tokenizers", "transformers", "yaml"), "training"),
    **dict.fromkeys(("jinja2", "matplotlib"), "report"),
    **dict.fromkeys(("hypothesis", "pytest", "xdist"), "suite"),
    "datasets": "datasets",
}


def _of_missing_package(error: Exception, command: str) -> str:
    """What to install where `error` says that a package of an extra is missing; "" for any other error."""
    name = str(error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"{command} needs {name}: {install_command(_EXTRAS[name])}" if name in _EXTRAS else ""


# what typer raises for a wrong command line; its module has no public name
_WrongCommandLine: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(CommandGroup):
    """Turns an expected error of a command into one line on stderr and exit code 2, Ctrl-C into one line and 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with in_one_line():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # the reader of the output closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            # wrong arguments have `show`: CommandGroup prints them
            shown = ctx.params.get("traceback") or os.environ.get(TRACEBACK)
            outside = of_an_outside_engine(error)
            if shown or hasattr(error, "show") or not (outside or is_expected(error)):
                raise
            text = in_words(error) if isinstance(error, OSError) else one_line(error)
            missing = _of_missing_package(error, ctx.invoked_subcommand or ctx.command_path)
            say_error(describe(error) if outside else missing or text)
            raise typer.Exit(2) from None


class OwnProgram:
    """The context object of a command that is a program by itself, so that it may fork; see isolation/forked.py."""


def check_choice(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """ValueError where `value` is given and is not one of `allowed`."""
    if value is not None and value not in allowed:
        raise ValueError(f"{option} is {value!r}, it takes one of {', '.join(allowed)}")


def print_verdict(passed: bool, text: str) -> None:
    """Print PASS or FAIL and `text`; exit 1 unless `passed`."""
    typer.echo(f"{'PASS' if passed else 'FAIL'} {text}")
    if not passed:
        raise typer.Exit(1)
