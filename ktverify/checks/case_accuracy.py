"""A case through an engine, tensor by tensor against the oracle: what the families forward and backward are made of."""

from __future__ import annotations

from ktverify.checks import accuracy
from ktverify.checks.accuracy import Checked
from ktverify.diagnose.hook import add_cause, cause_of
from ktverify.errors import NotPassed, Unsupported
from ktverify.judge import golden
from ktverify.runs.record import AccuracyRecord
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BACKWARD_TENSORS, OUTPUT

TENSORS: dict[str, tuple[str, ...]] = {"forward": (OUTPUT,), "backward": BACKWARD_TENSORS}


_prepared: Checked | None = None


def prepare(case: Case, fresh: int | None) -> None:
    """Make the inputs of a case and what they have to give; `check_case` then takes them.

    Knows no engine: what is raised here, for a golden that is missing or of other inputs, is the suite's own defect.
    """
    global _prepared
    ready, _prepared = _prepared, None
    _prepared = _ready(ready, case, fresh)


def _ready(kept: Checked | None, case: Case, fresh: int | None) -> Checked:
    case = case if fresh is None else case.with_seed(fresh)
    live = fresh is not None
    if not live:
        golden.load(case)  # without one, verify would go on with a live oracle
    # The next instruction set asks for the same case again: its inputs and what they have to give are kept.
    if kept is not None and kept.case == case and (kept.source == "fresh") == live:
        return kept
    inputs = make_inputs(case)
    return Checked(case, inputs, {}, *accuracy.expected_of(case, inputs, fresh=live))


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
    global _prepared
    ready, _prepared = _prepared, None
    given = _ready(ready, case, fresh)
    checked = accuracy.check_case(
        engine,
        given.case,
        isa=isa,
        tp=tp,
        threads=threads,
        fresh=fresh is not None,
        backward=family == "backward",
        tensors=TENSORS[family],
        given=given,
    )
    add_cause(checked, engine, isa=isa, tp=tp)
    _prepared = checked
    return checked.records


def lost(family: str, engine: str, case: Case, label: str, error: BaseException) -> list[AccuracyRecord]:
    """The records of a case whose engine gave no tensors at all."""
    return accuracy.lost(error, TENSORS[family], engine, case, label)


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
