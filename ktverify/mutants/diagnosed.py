"""How many mutants get the right first-ranked cause: the measure of the diagnosis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ktverify.checks.target import Target
from ktverify.diagnose.asking import Asking
from ktverify.diagnose.diagnose import diagnose
from ktverify.diagnose.search import Diagnosis, one_thread
from ktverify.mutants.base import Mutant
from ktverify.spec.cases import Case, catalogue

LEAST = 0.8  # share of the mutants whose first-ranked cause must be right
SECONDS = 300.0  # so that a slow machine finds the same
# for the mutants whose check has no case of the catalogue: most of them compute it right
_PLAIN = Case.parse("E=6,k=2,H=72,I=40,T=40,r=8,alpha=16")


@dataclass(frozen=True)
class DiagnosedMutant:
    """A mutant and its diagnosis."""

    mutant: Mutant
    diagnosis: Diagnosis

    @property
    def found(self) -> str:
        """The first-ranked cause."""
        first = self.diagnosis.first
        return first.cause.value if first is not None else "none"

    @property
    def right(self) -> bool:
        return self.found == self.mutant.cause.value

    @property
    def line(self) -> str:
        """`right  lora_scale_one: lora_scale: cause: LoRA scaling: found 1.0, …`."""
        verdict = "right" if self.right else "WRONG"
        expected = "" if self.right else f" (expected {self.mutant.cause.value})"
        return f"{verdict}  {self.mutant.name}: {self.found}{expected}: {self.diagnosis.line}"


def diagnosed(mutants: Iterable[Mutant]) -> Iterator[DiagnosedMutant]:
    """Diagnose each mutant, on the case of the check that must find it."""
    with one_thread(), Asking() as asking:
        for mutant in mutants:
            case = catalogue().get(mutant.check.partition("/")[2], _PLAIN)
            found = diagnose(case, Target(mutant.engine), seconds=SECONDS, first_only=True, asking=asking)
            yield DiagnosedMutant(mutant, found)
