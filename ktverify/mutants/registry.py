"""The list of wrong engines: what each is said to be, and which check has to find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ktverify.checks.causes import Cause
from ktverify.mutants.base import Plain


@dataclass(frozen=True)
class Mutant:
    """A wrong engine: its name, one sentence on what is wrong, its cause, the check and the gate that must find it.

    check: a key of ktverify.mutants.checks, like forward/small. engine: what `--engine` takes.
    """

    name: str
    what: str
    cause: Cause
    check: str
    gate: str
    factory: type[Plain]

    @property
    def engine(self) -> str:
        return f"{self.factory.__module__}:{self.name}"


MUTANTS: dict[str, Mutant] = {}


def mutant(cause: Cause, check: str, gate: str = "rel_l2") -> Callable[[type[Plain]], type[Plain]]:
    """Enter a class into MUTANTS. ValueError for a name that is there already, or a class that does not say what."""

    def enter(factory: type[Plain]) -> type[Plain]:
        name, what = factory.__name__, " ".join((factory.__doc__ or "").split())
        if name in MUTANTS or not what:
            raise ValueError(f"mutant {name}: it takes a name of its own and a docstring that says what is wrong")
        MUTANTS[name] = Mutant(name, what, cause, check, gate, factory)
        return factory

    return enter
