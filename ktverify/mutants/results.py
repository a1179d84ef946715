"""A Result for people and for programs: the table of mutants and gates, and reports/mutants.json."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from ktverify.judge.gates import GATES
from ktverify.mutants import MUTANTS
from ktverify.mutants.kills import Exceeded
from ktverify.mutants.runner import NOT_OF_ENGINES, Result, worst

COMMAND = "python -m ktverify mutants"


def verdict_line(result: Result) -> str:
    """`PASS 90 of 90 mutants killed`, and how many gates kill somebody whom nothing else kills."""
    killed = len(result.kills) - len(result.alive)
    word = "PASS" if not result.alive else "FAIL"
    return f"{word} {killed} of {len(result.kills)} mutants killed by {result.checks} checks"


def gates_line(result: Result) -> str:
    """How many gates kill a mutant that lives without them; who does not, by name."""
    needed = len(result.only) - len(result.idle_gates)
    missing = f"; not needed by any: {', '.join(result.idle_gates)}" if result.idle_gates else ""
    return f"{needed} of {len(result.only)} gates kill a mutant that nothing else kills{missing}"


def over(exceeded: Exceeded) -> str:
    """`rel_l2 x 34`: the gate, and how many times its budget was used; the gate alone where it has no budget."""
    return f"{exceeded.gate} x {exceeded.used:.3g}" if math.isfinite(exceeded.used) else exceeded.gate


def print_result(result: Result, console: Console) -> None:
    """Verdict first, then mutants, then gates."""
    console.print(verdict_line(result))
    console.print(gates_line(result))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("mutant", "cause", "killed by", "checks", "worst gate, times its budget"):
        table.add_column(heading, justify="right" if heading == "checks" else "left", overflow="fold")
    for name, kills in result.kills.items():
        first = ", ".join(list(kills)[:3]) or "LIVES"
        table.add_row(name, MUTANTS[name].cause.value, first, str(len(kills)), over(worst(kills)) if kills else "")
    console.print(table)
    gates = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("gate", "what exceeds it", "mutants that live without it"):
        gates.add_column(heading, overflow="fold")
    for gate, names in result.only.items():
        gates.add_row(gate, GATES[gate], ", ".join(names))
    console.print(gates)
    console.print(f"{NOT_OF_ENGINES} judges cases, not engines: a test of its own shows what it catches.")


def as_json(result: Result) -> str:
    """The whole Result; used: null where the gate has no budget."""
    document: dict[str, Any] = {
        "command": COMMAND,
        "checks": result.checks,
        "mutants": {
            name: {
                "what": MUTANTS[name].what,
                "cause": MUTANTS[name].cause.value,
                "killed_by": {check: [_plain(one) for one in found] for check, found in kills.items()},
            }
            for name, kills in result.kills.items()
        },
        "killed_by_this_gate_only": result.only,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _plain(one: Exceeded) -> list[object]:
    return [one.gate, float(f"{one.used:.3g}") if math.isfinite(one.used) else None]
