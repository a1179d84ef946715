"""The cause below a failing line: looked for once per failing case, in bounded time, from the tensors alone.

Comes in: a `Checked` of ktverify.verify. Goes out: the same records; the first that failed has one more line in its
message. No verdict is touched, and what goes wrong in here is one line too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktverify.engines import registry
from ktverify.judge.gates import Verdict

if TYPE_CHECKING:
    from ktverify.checks.accuracy import Checked

SECONDS = 5.0
_LARGE = 1 << 23  # base weights of active experts (elements) above which nothing is looked for unasked
PREFIX = "cause: "


def add_cause(checked: Checked, engine: str, *, isa: str | None = None, tp: int = 1) -> None:
    """Append the first-ranked cause to the message of the first record that failed; nothing where none did."""
    failed = next((i for i, record in enumerate(checked.records) if record.verdict == Verdict.FAIL.value), None)
    if failed is None:
        return
    record = checked.records[failed]
    line = cause_line(checked, engine, isa=isa, tp=tp)
    checked.records[failed] = record.model_copy(update={"message": f"{record.message}\n{line}"})


def cause_line(checked: Checked, engine: str, *, isa: str | None = None, tp: int = 1) -> str:
    """`cause: …` in one line, whatever happens."""
    case = checked.case
    command = f"python -m ktverify diagnose '{case.id}'{registry.option(engine)}"
    command += (f" --isa {isa}" if isa else "") + (f" --tp {tp}" if tp != 1 else "")
    if 3 * len(checked.inputs.active) * case.hidden * case.intermediate > _LARGE:
        return f"{PREFIX}not looked for in a case of this size; {command}"
    try:
        from ktverify.diagnose.search import diagnose

        found = diagnose(
            case, engine, isa=isa, tp=tp, inputs=checked.inputs, actual=checked.actual, behaviour=False, seconds=SECONDS
        )
        if found.first is None:
            return f"{PREFIX}no hypothesis about the tensors fits; {command} makes further calls"
        return " ".join(found.line.split())
    except Exception as error:  # a defect of the diagnosis must not stand in for the engine's
        return f"{PREFIX}not found, the diagnosis itself failed: {type(error).__name__}: {' '.join(str(error).split())}"


def cause_of(message: str) -> str:
    """The line that add_cause put into a record's message; "" where there is none."""
    return next((line for line in message.splitlines() if line.startswith(PREFIX)), "")
