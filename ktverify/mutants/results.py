"""A Result for people and for programs: the table of mutants and gates, and reports/mutants.json."""

from __future__ import annotations

import json
import math
from typing import Any

from ktverify.judge.gates import GATES
from ktverify.mutants import MUTANTS
from ktverify.mutants.kills import Exceeded
from ktverify.mutants.runner import Result, worst

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


def mutant_rows(result: Result) -> list[dict[str, str]]:
    """A row for each mutant: its cause, the first three checks that kill it, the gate that it exceeds most."""
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


def gate_rows(result: Result) -> list[dict[str, str]]:
    """A row for each gate: what exceeds it, and the mutants that only it kills."""
    return [
        {"gate": gate, "what exceeds it": GATES[gate], "mutants that live without it": ", ".join(names)}
        for gate, names in result.only.items()
    ]


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
