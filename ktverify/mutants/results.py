"""A KillTable as lines, as rows of tables, and as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from ktverify.judge.gates import GATES
from ktverify.mutants import MUTANTS
from ktverify.mutants.kills import Exceeded
from ktverify.mutants.runner import KillTable, worst

COMMAND = "python -m ktverify mutants"


def verdict_line(result: KillTable) -> str:
    """`PASS 106 of 106 mutants killed, 410 checks asked`."""
    killed = len(result.kills) - len(result.alive)
    word = "PASS" if not result.alive else "FAIL"
    return f"{word} {killed} of {len(result.kills)} mutants killed, {result.checks} checks asked"


def gates_line(result: KillTable) -> str:
    """How many gates kill a mutant that survives without them, and the names of the others."""
    needed = len(result.only) - len(result.idle_gates)
    missing = f"; not needed by any: {', '.join(result.idle_gates)}" if result.idle_gates else ""
    return f"{needed} of {len(result.only)} gates kill a mutant that nothing else kills{missing}"


def over(exceeded: Exceeded) -> str:
    """`rel_l2 x 34`: the gate and the share of its budget; only the gate if it has no budget."""
    return f"{exceeded.gate} x {exceeded.used:.3g}" if math.isfinite(exceeded.used) else exceeded.gate


def mutant_rows(result: KillTable) -> list[dict[str, str]]:
    """A row per mutant: its cause, the first three checks that kill it, and the gate that it exceeds by most."""
    return [
        {
            "mutant": name,
            "cause": MUTANTS[name].cause.value,
            "killed by": ", ".join(list(kills)[:3]) or "LIVES",
            "checks": str(len(kills)),
            "worst gate, times its budget": over(worst(kills)) if kills else "",
        }
        for name, kills in result.kills.items()
    ]


def gate_rows(result: KillTable) -> list[dict[str, str]]:
    """A row per gate: what exceeds it, and the mutants that it alone kills."""
    return [
        {"gate": gate, "what exceeds it": GATES[gate], "mutants that live without it": ", ".join(names)}
        for gate, names in result.only.items()
    ]


def as_json(result: KillTable) -> str:
    """The whole table; the share of the budget is null where the gate has none."""
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
