"""Add the cause to a failing record: searched once per failing case, for a limited time, on the tensors only.

The verdict never depends on it. The pytest plugin and the command line call this; the checks do not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ktverify.checks.causes import PREFIX, UNKNOWN
from ktverify.engines import registry
from ktverify.judge.gates import Verdict

if TYPE_CHECKING:
    from ktverify.checks.problem import Result
    from ktverify.checks.target import Target

SECONDS = 5.0  # of processor time that the search may take for one case
# of processor time for all cases of a process: else an engine that is wrong in every case takes minutes more to judge
SECONDS_IN_ALL = 40.0
_spent = 0.0


def options(target: Target) -> str:
    """The options of a command line that name this engine, instruction set and tensor parallel degree."""
    isa = f" --isa {target.isa}" if target.isa else ""
    return registry.option(target.engine) + isa + (f" --tp {target.tp}" if target.tp != 1 else "")


def add_cause(result: Result, target: Target) -> None:
    """Append the first-ranked cause to the message of the first record that failed, if any failed."""
    failed = next((i for i, record in enumerate(result.records) if record.verdict == Verdict.FAIL.value), None)
    if failed is not None:
        record = result.records[failed]
        line = cause_line(result, target)
        result.records[failed] = record.model_copy(update={"message": f"{record.message}\n{line}"})


def cause_line(result: Result, target: Target) -> str:
    """`cause: …`, one line. Raises nothing."""
    global _spent
    case, inputs = result.problem.case, result.problem.inputs
    command = f"python -m ktverify diagnose '{case.id}'{options(target)}"
    try:
        from ktverify.diagnose.diagnose import diagnose
        from ktverify.diagnose.search import LARGE

        if 3 * len(inputs.active) * case.hidden * case.intermediate > LARGE:
            return f"{PREFIX}{UNKNOWN} in a case of this size; {command}"
        if _spent >= SECONDS_IN_ALL:
            return f"{PREFIX}{UNKNOWN}, the search took {_spent:.0f} s for other cases; {command}"
        began = time.process_time()
        try:
            found = diagnose(case, target, inputs=inputs, actual=result.actual, run_checks=False, seconds=SECONDS)
        finally:
            _spent += time.process_time() - began
        if found.first is None:
            return f"{PREFIX}no hypothesis about the tensors fits; {command} makes further calls"
        return " ".join(found.line.split())
    except Exception as error:  # a defect of the search must not replace the engine's
        return f"{PREFIX}not found, the diagnosis itself failed: {type(error).__name__}: {' '.join(str(error).split())}"
