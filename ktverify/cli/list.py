"""The command `list`: the cases of the catalogue, none wider than 110 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from ktverify.cli.options import check_choice
from ktverify.spec.cases import DATA_KINDS, TIERS, Case, flops, select
from ktverify.system.limits import format_bytes

_SIZES = ("E", "k", "H", "I", "T", "r", "alpha")
_TEXTS = ("data", "LoRA", "routing", "TP")


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
    check_choice("--tier", tier, TIERS)
    check_choice("--data", data, tuple(DATA_KINDS))
    chosen = select(cases, tier=tier, data=data)
    if not chosen:
        raise ValueError(f"no case matches {cases!r} with these options; `python -m ktverify list` shows all")
    _print_cases(chosen, cost=cost)


def _print_cases(chosen: Sequence[Case], *, cost: bool) -> None:
    """Print each case's sizes and why it exists; cost: its arithmetic and weights instead, and their sums."""
    from ktverify.report.console import make_console, print_grid
    from ktverify.report.grid import Grid

    rows = []
    kinds = ("GFLOP", "weights") if cost else _TEXTS
    sums = [0.0, 0.0]
    for case in chosen:
        sizes = [case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank]
        cells = [case.name, case.tier, *map(str, sizes), f"{case.alpha:g}"]
        if cost:
            operations = flops(case, backward=True) / 1e9
            weights = 6.0 * case.num_experts * case.hidden * case.intermediate
            sums = [sums[0] + operations, sums[1] + weights]
            cells += [f"{operations:.2f}", format_bytes(weights)]
        else:
            cells += [case.data, {"bfloat16": "bf16", "float32": "fp32"}[case.lora_dtype], case.routing]
            cells.append(" ".join(map(str, case.tp)))
        rows.append(tuple(cells))
    if cost:
        rows.append(("sum", *[""] * (1 + len(_SIZES)), f"{sums[0]:.2f}", format_bytes(sums[1])))
    console = make_console()
    with console.capture() as drawn:
        print_grid(console, Grid("", (), ("case", "tier", *_SIZES, *kinds), tuple(rows), left=("tier", *_TEXTS)))
    lines = [line.rstrip() for line in drawn.get().splitlines()]
    if cost:
        print("\n".join(lines))
        print("GFLOP: forward and backward, every slot taken. weights: declared, in bf16; idle experts take none.")
        return
    print(lines[0])
    for line, case in zip(lines[1:], chosen, strict=True):
        print(f"{line}\n    {case.why}")
