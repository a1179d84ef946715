"""The cause below a failing line: looked for once per failing case, in bounded time, from the tensors alone.

Input: a Result. Output: the same records; the first that failed has one more line in its message. No verdict changes,
and an error in here becomes one line too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktverify.checks.causes import PREFIX
from ktverify.engines import registry
from ktverify.judge.gates import Verdict

if TYPE_CHECKING:
    from ktverify.checks.problem import Result
    from ktverify.checks.target import Target

SECONDS = 5.0
_LARGE = 1 << 23  # base weights of active experts (elements) above which nothing is looked for unasked


def add_cause(result: Result, target: Target) -> None:
    """Append the first-ranked cause to the message of the first record that failed; nothing where none did."""
    failed = next((i for i, record in enumerate(result.records) if record.verdict == Verdict.FAIL.value), None)
    if failed is None:
        return
    record = result.records[failed]
    line = cause_line(result, target)
    result.records[failed] = record.model_copy(update={"message": f"{record.message}\n{line}"})


def cause_line(result: Result, target: Target) -> str:
    """`cause: …` in one line, whatever happens."""
    case, inputs = result.problem.case, result.problem.inputs
    command = f"python -m ktverify diagnose '{case.id}'{registry.option(target.engine)}"
    command += (f" --isa {target.isa}" if target.isa else "") + (f" --tp {target.tp}" if target.tp != 1 else "")
    if 3 * len(inputs.active) * case.hidden * case.intermediate > _LARGE:
        return f"{PREFIX}not looked for in a case of this size; {command}"
    try:
        from ktverify.diagnose.search import diagnose

        found = diagnose(
            case,
            target.engine,
            isa=target.isa,
            tp=target.tp,
            inputs=inputs,
            actual=result.actual,
            behaviour=False,
            seconds=SECONDS,
        )
        if found.first is None:
            return f"{PREFIX}no hypothesis about the tensors fits; {command} makes further calls"
        return " ".join(found.line.split())
    except Exception as error:  # a defect of the diagnosis must not stand in for the engine's
        return f"{PREFIX}not found, the diagnosis itself failed: {type(error).__name__}: {' '.join(str(error).split())}"
