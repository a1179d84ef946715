"""What a run says against an engine, as far as one forward and backward of a case can show it.

Comes in: a run's records. Goes out: accusations, one for each tensor that failed and one for each case that ended the
engine or was not answered, each told once however many checks told it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ktverify.runs.record import NOT_RUN, AccuracyRecord, LatencyRecord, Result, VerdictName
from ktverify.spec.cases import Case
from ktverify.spec.names import ALL_TENSORS

# of what else a run may say (OOM, MISTRUSTED), the same calls without the suite's limits and gates show nothing
SHOWN: tuple[VerdictName, ...] = ("FAIL", "CRASH", "TIMEOUT")
# a line of a check that judged a case's tensors by itself, like "  TP 2: FAIL grad_input non_finite 96, budget 0"
_LINE = re.compile(r"^\s*(?:TP (\d+): )?FAIL (\w+) (.*)$", re.MULTILINE)
_NON_FINITE = re.compile(r"^non_finite (\d+)$")
_SIGNAL = re.compile(r"\bSIG[A-Z]+\b|\bexit code \d+")


@dataclass(frozen=True)
class Place:
    """Where it happened: a case's id, the tensor-parallel degree, the label of the instruction set."""

    case: str
    tp: int = 1
    isa: str = ""

    def __str__(self) -> str:
        parts = (Case.parse(self.case).brief, f"TP {self.tp}" if self.tp != 1 else "", self.isa)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Accusation:
    """What was said: the verdict; the tensor, "" for what is no single one's; what the suite found, in few words.

    exact: the check takes nothing but the one right answer of integer data. message: all that the suite said.
    """

    place: Place
    verdict: VerdictName
    tensor: str
    suite: str
    exact: bool = False
    message: str = field(default="", compare=False)


def accusations(records: Iterable[Result]) -> list[Accusation]:
    """By place, in the order of the run; the tensors of each in the contract's order, what is no tensor's first."""
    found: dict[tuple[Place, str], Accusation] = {}
    for record in records:
        for accusation in _of(record):
            found.setdefault((accusation.place, accusation.tensor), accusation)
    places = list(dict.fromkeys(place for place, _ in found))
    return [found[place, tensor] for place in places for tensor in ("", *ALL_TENSORS) if (place, tensor) in found]


def untold(records: Iterable[Result]) -> int:
    """How many records that are no pass accuse of something that no accusation holds."""
    bad = [record for record in records if record.verdict not in (*NOT_RUN, "PASS")]
    return sum(not any(True for _ in _of(record)) for record in bad)


def _of(record: Result) -> Iterator[Accusation]:
    if record.verdict not in SHOWN or isinstance(record, LatencyRecord) or not record.case:
        return
    place = Place(record.case, record.tp, record.isa)
    if record.verdict != "FAIL":
        ended = _SIGNAL.search(record.message)
        yield Accusation(place, record.verdict, "", ended.group() if ended else record.verdict, message=record.message)
    elif isinstance(record, AccuracyRecord):
        yield Accusation(place, "FAIL", record.tensor, error_text(record.rel_l2, record.non_finite))
    else:
        exact = record.family == "exact"
        lines = [match.groups() for match in _LINE.finditer(record.message) if match.group(2) in ALL_TENSORS]
        for tp, tensor, text in lines:
            there = Place(record.case, int(tp), record.isa) if tp else place
            yield Accusation(there, "FAIL", tensor, _NON_FINITE.sub(r"\1 not finite", text.partition(", ")[0]), exact)
        if not lines:
            yield Accusation(place, "FAIL", "", record.message.partition("\n")[0][:60], exact)


def error_text(rel_l2: float, non_finite: int) -> str:
    """An error in few words: "1.00e+00", or "8192 not finite"."""
    return f"{non_finite} not finite" if non_finite else f"{rel_l2:.2e}"
