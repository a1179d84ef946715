"""A case through an engine, tensor by tensor against the oracle: what the families forward and backward are made of."""

from __future__ import annotations

from ktverify import golden, verify
from ktverify.cases import Case
from ktverify.diagnose.hook import add_cause, cause_of
from ktverify.names import BACKWARD_TENSORS, OUTPUT
from ktverify.report.record import AccuracyRecord
from ktverify.verify import Checked
from suites.support.unsupported import Unsupported

TENSORS: dict[str, tuple[str, ...]] = {"forward": (OUTPUT,), "backward": BACKWARD_TENSORS}


_last: Checked | None = None


def check_case(
    family: str,
    engine: str,
    case: Case,
    *,
    isa: str | None = None,
    fresh: int | None = None,
    tp: int = 1,
    threads: int | None = None,
) -> list[AccuracyRecord]:
    """One record for each tensor of `family` ("forward" or "backward") of `case` on `engine`.

    isa: what the engine's `isa=` gets. fresh: a seed for new inputs and a live oracle; without it a case that has no
    golden is an error. What the engine raises comes through.
    """
    global _last
    case = case if fresh is None else case.with_seed(fresh)
    live = fresh is not None
    if not live:
        golden.load(case)
    # The next instruction set asks for the same case again: its inputs and what they have to give are kept.
    given = _last if _last is not None and _last.case == case and _last.records[0].source == source(live) else None
    _last = None
    _last = verify.check_case(
        engine,
        case,
        isa=isa,
        tp=tp,
        threads=threads,
        fresh=live,
        backward=family == "backward",
        tensors=TENSORS[family],
        given=given,
    )
    add_cause(_last, engine, isa=isa, tp=tp)
    return _last.records


def source(live: bool) -> str:
    """What records call the origin of the expected values."""
    return "fresh" if live else "golden"


def lost(family: str, engine: str, case: Case, label: str, error: BaseException) -> list[AccuracyRecord]:
    """The records of a case whose engine gave no tensors at all."""
    return verify.lost(error, TENSORS[family], engine, case, label)


class NotPassed(AssertionError):
    """A case of which a tensor did not pass; its records have told it."""


def assert_passed(records: list[AccuracyRecord]) -> None:
    """NotPassed with the line of every tensor that did not pass and what repeats it; Unsupported where nothing ran."""
    failed = [record for record in records if record.verdict != "PASS"]
    if failed and all(record.verdict == "UNSUPPORTED" for record in failed):
        raise Unsupported(failed[0].message.removeprefix("UNSUPPORTED "))
    if failed:
        lines = dict.fromkeys(record.message.partition("\n")[0] for record in failed)
        causes = dict.fromkeys(cause for cause in (cause_of(record.message) for record in failed) if cause)
        raise NotPassed("\n".join([*lines, *causes, failed[0].repro, f"({failed[0].case}: {failed[0].why})"]))
    if not records:
        raise AssertionError("nothing was compared")
