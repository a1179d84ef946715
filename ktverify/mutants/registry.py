"""The list of mutants: the cause of each, and the check and the gate that must find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ktverify.checks.causes import Cause
from ktverify.mutants.base import Plain


@dataclass(frozen=True)
class Mutant:
    """An engine that is wrong in one way.

    what: one sentence on it. check: the id of the check that must find it, like forward/small, and gate: the gate that
    it exceeds there.
    """

    name: str
    what: str
    cause: Cause
    check: str
    gate: str
    factory: type[Plain]

    @property
    def engine(self) -> str:
        """The name that `--engine` takes."""
        return f"{self.factory.__module__}:{self.name}"


MUTANTS: dict[str, Mutant] = {}


def mutant(cause: Cause, check: str, gate: str = "rel_l2") -> Callable[[type[Plain]], type[Plain]]:
    """Enter a class into MUTANTS. ValueError for a name that is taken, or a class without a docstring."""

    def enter(factory: type[Plain]) -> type[Plain]:
        name, what = factory.__name__, " ".join((factory.__doc__ or "").split())
        if name in MUTANTS or not what:
            raise ValueError(f"mutant {name}: it takes a name of its own and a docstring that says what is wrong")
        MUTANTS[name] = Mutant(name, what, cause, check, gate, factory)
        return factory

    return enter
