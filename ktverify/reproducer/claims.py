"""The claims of a run against its engine, as far as one forward and backward of a case can show them.

Input: a run's records. Output: one claim for each tensor that failed, and one for each case that crashed the engine or
got no answer, however many checks reported it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ktverify.runs.record import NOT_RUN, AccuracyRecord, AnyRecord, LatencyRecord, VerdictName
from ktverify.spec.cases import Case
from ktverify.spec.names import ALL_TENSORS

# the same calls without the suite's limits and gates show nothing of the other verdicts (OOM, MISTRUSTED)
SHOWN: tuple[VerdictName, ...] = ("FAIL", "CRASH", "TIMEOUT")
# a line of a check that judged a case's tensors by itself, like "  TP 2: FAIL grad_input non_finite 96, budget 0"
_LINE = re.compile(r"^\s*(?:TP (\d+): )?FAIL (\w+) (.*)$", re.MULTILINE)
_NON_FINITE = re.compile(r"^non_finite (\d+)$")
_SIGNAL = re.compile(r"\bSIG[A-Z]+\b|\bexit code \d+")


@dataclass(frozen=True)
class CaseRun:
    """Where it happened: a case's id, the tensor parallel degree, the label of the instruction set."""

    case: str
    tp: int = 1
    isa: str = ""

    def __str__(self) -> str:
        parts = (Case.parse(self.case).brief, f"TP {self.tp}" if self.tp != 1 else "", self.isa)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Claim:
    """One claim. tensor: "" where it is not about a single one. suite: what the suite found, in few words.

    exact: the check accepts only the one right answer of integer data. message: the whole text of the suite.
    """

    where: CaseRun
    verdict: VerdictName
    tensor: str
    suite: str
    exact: bool = False
    message: str = field(default="", compare=False)


def claims(records: Iterable[AnyRecord]) -> list[Claim]:
    """All claims in the order of the run; those of one case run together, first the one about no single tensor."""
    found: dict[tuple[CaseRun, str], Claim] = {}
    for record in records:
        for claim in _of(record):
            found.setdefault((claim.where, claim.tensor), claim)
    runs = list(dict.fromkeys(where for where, _ in found))
    keys = [(where, tensor) for where in runs for tensor in ("", *ALL_TENSORS)]
    return [found[key] for key in keys if key in found]


def without_claim(records: Iterable[AnyRecord]) -> int:
    """Number of non-passing records that no claim covers."""
    bad = [record for record in records if record.verdict not in (*NOT_RUN, "PASS")]
    return sum(not any(True for _ in _of(record)) for record in bad)


def _of(record: AnyRecord) -> Iterator[Claim]:
    if record.verdict not in SHOWN or isinstance(record, LatencyRecord) or not record.case:
        return
    where = CaseRun(record.case, record.tp, record.isa)
    if record.verdict != "FAIL":
        ended = _SIGNAL.search(record.message)
        yield Claim(where, record.verdict, "", ended.group() if ended else record.verdict, message=record.message)
    elif isinstance(record, AccuracyRecord):
        yield Claim(where, "FAIL", record.tensor, error_text(record.rel_l2, record.non_finite))
    else:
        exact = record.family == "exact"
        lines = [match.groups() for match in _LINE.finditer(record.message) if match.group(2) in ALL_TENSORS]
        for tp, tensor, text in lines:
            there = CaseRun(record.case, int(tp), record.isa) if tp else where
            yield Claim(there, "FAIL", tensor, _NON_FINITE.sub(r"\1 not finite", text.partition(", ")[0]), exact)
        if not lines:
            yield Claim(where, "FAIL", "", record.message.partition("\n")[0][:60], exact)


def error_text(rel_l2: float, non_finite: int) -> str:
    """An error in few words: "1.00e+00", or "8192 not finite"."""
    return f"{non_finite} not finite" if non_finite else f"{rel_l2:.2e}"
