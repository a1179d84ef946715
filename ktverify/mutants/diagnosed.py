"""How many of the engines that are wrong on purpose get the right first-ranked cause.

Each is diagnosed on the case that its expected check runs; where that check is about behaviour, on the small case of
the probes. `python -m ktverify diagnose --mutants` starts this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import typer

from ktverify.diagnose.search import Diagnosis, diagnose, one_thread
from ktverify.diagnose.stand import BEHAVIOUR
from ktverify.mutants import MUTANTS, Mutant
from ktverify.spec.cases import Case, catalogue

LEAST = 0.8  # of the mutants
SECONDS = 300.0  # a slow machine must not change what is found


@dataclass(frozen=True)
class Diagnosed:
    """A mutant and what the diagnosis says of it."""

    mutant: Mutant
    diagnosis: Diagnosis

    @property
    def found(self) -> str:
        first = self.diagnosis.first
        return first.cause.value if first is not None else "none"

    @property
    def right(self) -> bool:
        return self.found == self.mutant.cause.value

    @property
    def line(self) -> str:
        verdict = "right" if self.right else "WRONG"
        expected = "" if self.right else f" (expected {self.mutant.cause.value})"
        return f"{verdict}  {self.mutant.name}: {self.found}{expected}: {self.diagnosis.line}"


def case_of(mutant: Mutant) -> Case:
    """The case of the check that has to find the mutant; the probes' own where the check has none."""
    return catalogue().get(mutant.check.partition("/")[2], BEHAVIOUR)


def diagnosed(mutants: Iterable[Mutant]) -> Iterator[Diagnosed]:
    """One after the other, in this process."""
    with one_thread():
        for mutant in mutants:
            yield Diagnosed(mutant, diagnose(case_of(mutant), mutant.engine, seconds=SECONDS))


def main(names: list[str] | None = typer.Argument(None)) -> None:  # noqa: B008
    """Diagnose mutants (default: all), say how many first-ranked causes are right; exit code 1 below 80 %."""
    unknown = [name for name in names or [] if name not in MUTANTS]
    if unknown:
        typer.echo(f"error: no mutant is called {unknown[0]}; it takes some of {', '.join(MUTANTS)}", err=True)
        raise typer.Exit(2)
    chosen = [MUTANTS[name] for name in names or MUTANTS]
    results = []
    for number, result in enumerate(diagnosed(chosen), start=1):
        typer.echo(f"{number}/{len(chosen)} {result.mutant.name}", err=True)
        typer.echo(result.line)
        results.append(result)
    right = sum(result.right for result in results)
    passed = right >= LEAST * len(results)
    share = f"{right} of {len(results)} first-ranked causes are right ({100 * right / len(results):.0f} %)"
    typer.echo(f"{'PASS' if passed else 'FAIL'} {share}, at least {100 * LEAST:.0f} % must be")
    if not passed:
        raise typer.Exit(1)
