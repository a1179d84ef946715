"""Run every check on every mutant: which check kills which mutant, and which mutants only one gate kills.

Checks are the outer loop, so that the inputs and the oracle of a case are computed once for all mutants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass, field

from ktverify.checks import registry
from ktverify.isolation.child import workers
from ktverify.judge.gates import GATES
from ktverify.mutants import MUTANTS, Mutant
from ktverify.mutants.kills import Exceeded, ask

# judges the case, not the engine; tests/mutants/test_mutants.py shows what it catches
NOT_OF_ENGINES = "trust"


@dataclass
class KillTable:
    """checks: how many ran. kills: mutant -> check -> the gates it exceeded. only: gate -> mutants it alone kills."""

    checks: int
    kills: dict[str, dict[str, list[Exceeded]]]
    only: dict[str, list[str]] = field(default_factory=dict)

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


def run(mutants: list[Mutant], jobs: int, step: Callable[[str, int, int, str], None]) -> KillTable:
    """Run all checks on `mutants` in `jobs` processes; `step` gets ("checks" or "gates", done, of, what) after each."""
    names = [mutant.name for mutant in mutants]
    table = [check.id for check in registry.of_any_engine()]
    result = KillTable(len(table), {name: {} for name in names})
    order = {key: place for place, key in enumerate(table)}
    with workers(jobs) as pool:
        waiting = [pool.submit(_one_check, key, names) for key in table]
        for done, future in enumerate(as_completed(waiting), start=1):
            key, found = future.result()
            for name, exceeded in found.items():
                if exceeded:
                    result.kills[name][key] = exceeded
            step("checks", done, len(waiting), key)
        for name, kills in result.kills.items():
            result.kills[name] = dict(sorted(kills.items(), key=lambda item: order[item[0]]))
        result.only = {gate: [] for gate in GATES if gate != NOT_OF_ENGINES}
        trials = [(gate, name) for gate in result.only for name in candidates(result.kills, gate)]
        turned_off = [pool.submit(_one_gate, gate, name, list(result.kills[name])) for gate, name in trials]
        for done, trial in enumerate(as_completed(turned_off), start=1):
            gate, name, lives = trial.result()
            if lives:
                result.only[gate].append(name)
            step("gates", done, len(turned_off), f"{name} without {gate}")
    for lived in result.only.values():
        lived.sort(key=names.index)
    return result
