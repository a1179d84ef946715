"""Run every check on every mutant: which check kills which mutant, and which mutants only one gate kills.

`run` makes a KillTable; the functions below it give it as lines, as rows of tables and as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field

from ktverify.checks import registry
from ktverify.checks.check import Check
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.isolation.child import workers
from ktverify.judge.gates import GATES, gates_off
from ktverify.mutants import MUTANTS

# judges the case, not the engine; tests/mutants/test_mutants.py shows what it catches
NOT_OF_ENGINES = "trust"


@dataclass(frozen=True)
class Exceeded:
    """One gate that a check found exceeded. used: the share of its budget, inf where it has none. says: one line."""

    gate: str
    used: float
    says: str


def ask(check: Check, engine: str, *off: str) -> list[Exceeded]:
    """What `check` finds wrong with `engine`, with the gates `off` left out; [] if nothing."""
    target = Target(engine, gates_off=gates_off(*off))
    try:
        registry.run(check, target)
    except GateFailed as failed:
        return [Exceeded(gate, used, str(failed).partition("\n")[0]) for gate, used in failed.exceeded]
    except AssertionError as error:
        # the check could not be made
        return [Exceeded("check", math.inf, str(error).partition("\n")[0])]
    except Exception as error:
        # the engine raised where it should have computed: no gate, and none can hide it
        return [Exceeded("raised", math.inf, f"{type(error).__name__}: {error}".partition("\n")[0])]
    return []


@dataclass
class KillTable:
    """checks: how many ran. kills: mutant -> check -> the gates it exceeded. only: gate -> mutants it alone kills."""

    checks: int
    kills: dict[str, dict[str, list[Exceeded]]]
    only: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, mutants: Iterable[str]) -> KillTable:
        """The table of these mutants before the first check."""
        return cls(0, {name: {} for name in mutants})

    @property
    def alive(self) -> list[str]:
        """The mutants that no check kills."""
        return [name for name, kills in self.kills.items() if not kills]

    @property
    def idle_gates(self) -> list[str]:
        """The gates without a mutant that they alone kill."""
        return [gate for gate, names in self.only.items() if not names]


def worst(kills: dict[str, list[Exceeded]]) -> Exceeded:
    """The gate that was exceeded by most; the first one where no gate has a budget."""
    found = [exceeded for each in kills.values() for exceeded in each]
    finite = [exceeded for exceeded in found if math.isfinite(exceeded.used)]
    return max(finite, key=lambda exceeded: exceeded.used) if finite else found[0]


def _one_check(key: str, names: list[str]) -> tuple[str, dict[str, list[Exceeded]]]:
    return key, {name: ask(registry.find(key), MUTANTS[name].engine) for name in names}


def _one_gate(gate: str, name: str, keys: list[str]) -> tuple[str, str, bool]:
    """(gate, mutant, True if it survives without the gate). keys: the checks that kill it with the gate.

    Leaving a gate out adds no failure, so the other checks need not run again.
    """
    return gate, name, not any(ask(registry.find(key), MUTANTS[name].engine, gate) for key in keys)


def candidates(kills: dict[str, dict[str, list[Exceeded]]], gate: str) -> list[str]:
    """The mutants that exceed no other gate than `gate` in any check, those that fewest checks kill first."""
    names = [
        n for n, each in kills.items() if each and all({x.gate for x in found} == {gate} for found in each.values())
    ]
    return sorted(names, key=lambda name: len(kills[name]))


def run(result: KillTable, jobs: int) -> Iterator[str]:
    """Run all checks on the mutants of `result` in `jobs` processes and fill it; yields what was done, step by step."""
    names = list(result.kills)
    table = _asked()
    with workers(jobs) as pool:
        waiting = [pool.submit(_one_check, key, names) for key in table]
        for future in as_completed(waiting):
            key, found = future.result()
            for name, exceeded in found.items():
                if exceeded:
                    result.kills[name][key] = exceeded
            result.checks += 1
            yield f"{so_far(result)}; {key}"
        for name, kills in result.kills.items():
            result.kills[name] = {key: kills[key] for key in table if key in kills}
        result.only = {gate: [] for gate in GATES if gate != NOT_OF_ENGINES}
        trials = [(gate, name) for gate in result.only for name in candidates(result.kills, gate)]
        turned_off = [pool.submit(_one_gate, gate, name, list(result.kills[name])) for gate, name in trials]
        for done, trial in enumerate(as_completed(turned_off), start=1):
            gate, name, lives = trial.result()
            if lives:
                result.only[gate].append(name)
            yield f"gates left out: {done} of {len(turned_off)}; {name} without {gate}"
    for lived in result.only.values():
        lived.sort(key=names.index)


def _asked() -> list[str]:
    return [check.id for check in registry.of_any_engine()]


def so_far(result: KillTable) -> str:
    """`12 of 426 checks, which kill 40 of 126 mutants`; "" before the first check."""
    killed = len(result.kills) - len(result.alive)
    of = len(_asked())
    return (
        f"{result.checks} of {of} checks, which kill {killed} of {len(result.kills)} mutants" if result.checks else ""
    )


def verdict_line(result: KillTable) -> str:
    """`PASS 106 of 106 mutants killed, 410 checks asked`."""
    word, of = "FAIL" if result.alive else "PASS", len(result.kills)
    return f"{word} {of - len(result.alive)} of {of} mutants killed, {result.checks} checks asked"


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
    document = {
        "command": "python -m ktverify mutants",
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


def _plain(one: Exceeded) -> tuple[str, float | None]:
    return one.gate, float(f"{one.used:.3g}") if math.isfinite(one.used) else None
