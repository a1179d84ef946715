"""`python -m ktverify bench`: a group of commands; without the name of a command it is `bench shapes`.

`bench e16_t128` and `bench --list` mean `bench shapes e16_t128` and `bench shapes --list`. Help needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from ktverify.cli.bench_c2c import analyze, c2c_app
from ktverify.cli.bench_layer import layer, sweep
from ktverify.cli.bench_shapes import bench
from ktverify.cli.bench_transformer import memory, transformer

DEFAULT = "shapes"
COMMANDS: dict[str, Callable[..., None]] = {
    DEFAULT: bench,
    "layer": layer,
    "sweep": sweep,
    "transformer": transformer,
    "memory": memory,
    "analyze": analyze,
}


class DefaultGroup(TyperGroup):
    """A group whose first argument is DEFAULT if it is left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first not in self.commands and first not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def _with_hyphens(name: str) -> str:
    """Take --batch_sizes for --batch-sizes."""
    return name.replace("_", "-")


def bench_app() -> typer.Typer:
    """The group of commands."""
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "token_normalize_func": _with_hyphens}
    group = typer.Typer(cls=DefaultGroup, rich_markup_mode=None, help=HELP, context_settings=settings)
    for name, command in COMMANDS.items():
        group.command(name)(command)
    group.add_typer(c2c_app(settings), name="c2c")
    return group


HELP = """Time a layer, a transformer or a pipeline, or count memory. docs/profile.md and docs/c2c.md show each view.

\b
python -m ktverify bench [SHAPE]...         the engine beside its peers; options: bench shapes --help
python -m ktverify bench layer [CASE]       one layer: forward, backward, tensor parallelism, memory
python -m ktverify bench sweep [WHAT]...    its cost over qlen, rank, threads, experts
python -m ktverify bench transformer small  forward and backward of a transformer
python -m ktverify bench memory 2.7b        what a training step of a transformer takes
python -m ktverify bench c2c single         a pipeline of two models: single, batch, dataset, merge
python -m ktverify bench analyze FILE...    what `bench c2c` wrote: distribution, slowest prompts, CSV
"""
