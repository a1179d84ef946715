"""`python -m ktverify list`: the catalogue on a console.

Comes in: cases. Goes out: a line of sizes for each, and below it why it exists; none is wider than 110 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from ktverify.report.console import make_console, print_grid
from ktverify.report.grid import Grid
from ktverify.spec import cases as catalogue
from ktverify.spec.cases import Case
from ktverify.system.machine import format_bytes

_SIZES = ("E", "k", "H", "I", "T", "r", "alpha")
_TEXTS = ("data", "LoRA", "routing", "TP")


def print_cases(chosen: Sequence[Case], *, cost: bool) -> None:
    """cost: arithmetic and weights of each, and their sum, instead of its data and why it exists."""
    rows = []
    kinds = ("GFLOP", "weights") if cost else _TEXTS
    sums = [0.0, 0.0]
    for case in chosen:
        sizes = [case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank]
        cells = [case.name, case.tier, *map(str, sizes), f"{case.alpha:g}"]
        if cost:
            operations = catalogue.flops(case, backward=True) / 1e9
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
