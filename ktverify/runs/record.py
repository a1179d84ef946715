"""The one record: what a check found, as one line of JSON.

The suites, `repro` and `verify` make records; console, Markdown, HTML and the gate read them. A new printer needs no
new record. A new kind of check adds a field with a default, so that old runs stay readable.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ktverify.runs.jsonl import JsonLine
from ktverify.system.machine import Machine
from ktverify.system.printable import shown
from ktverify.system.timing import Statistics

if TYPE_CHECKING:
    from ktverify.judge.gates import Judgement
    from ktverify.judge.metrics import Difference
    from ktverify.spec.cases import Case

# in the order of an overview's columns
VerdictName = Literal["PASS", "FAIL", "CRASH", "TIMEOUT", "OOM", "MISTRUSTED", "UNSUPPORTED", "SKIP"]

# worst first: the order of every table. What did not run comes last, because it has no numbers to look at
VERDICT_ORDER: tuple[VerdictName, ...] = (
    "CRASH",
    "TIMEOUT",
    "OOM",
    "FAIL",
    "MISTRUSTED",
    "PASS",
    "UNSUPPORTED",
    "SKIP",
)

# nothing was computed, so there is neither a pass nor a failure to report
NOT_RUN: frozenset[str] = frozenset({"SKIP", "UNSUPPORTED"})

# accepts gates.Verdict, an enum, as well as its name
VerdictField = Annotated[VerdictName, BeforeValidator(lambda value: getattr(value, "value", value))]

# a text that comes from an engine or its user; pages, consoles and JSON get it as a record has it
Shown = Annotated[str, BeforeValidator(lambda value: shown(value) if isinstance(value, str) else value)]


class TimedLine(JsonLine):
    """Fields that all lines of a run have."""

    at: float = Field(default_factory=time.time, description="seconds since 1970, when the record was made")
    worker: str = Field(default="", description="the pytest-xdist worker that made it; empty without xdist")


class GateRecord(JsonLine):
    """One gate of one tensor: `value` against `budget`; `used` is their ratio (1.0 = all of the budget)."""

    model_config = ConfigDict(from_attributes=True)

    gate: str
    value: float
    budget: float
    used: float
    verdict: VerdictField
    reason: str = ""


class CheckedLine(TimedLine):
    """Fields of every line that has a verdict."""

    family: str
    engine: Shown
    isa: str = ""
    verdict: VerdictField
    message: Shown = ""
    repro: Shown = ""
    duration_s: float = 0.0


class AccuracyRecord(CheckedLine):
    """One tensor of one case against its oracle. `rel_l2`, `mean_rel`, `cosine`: no unit; `max_abs`: the tensor's."""

    kind: Literal["accuracy"] = "accuracy"
    case: Shown
    why: str = ""
    tensor: Shown
    threads: int = 0
    tp: int = 1
    source: str = "golden"
    mean_rel: float = float("nan")
    rel_l2: float = float("nan")
    cosine: float = float("nan")
    max_abs: float = float("nan")
    worst_index: tuple[int, ...] = ()
    non_finite: int = 0
    estimated: bool = False
    gates: tuple[GateRecord, ...] = ()

    @property
    def failed_gates(self) -> list[GateRecord]:
        return [gate for gate in self.gates if gate.verdict not in ("PASS", *NOT_RUN)]

    @model_validator(mode="after")
    def _verdict_agrees(self) -> AccuracyRecord:
        if self.verdict == "PASS" and self.failed_gates:
            raise ValueError(f"verdict is PASS although gate {self.failed_gates[0].gate} is not")
        return self

    @property
    def deciding_gate(self) -> GateRecord | None:
        """The gate that failed, or the one that came nearest to its budget; None where nothing was compared."""
        # the gate of trust judges the expected values: it is no error, so it uses up no budget
        asked = self.failed_gates or [gate for gate in self.gates if gate.gate != "trust"]
        return max(asked, key=lambda gate: (_nan_as_inf(gate.used), gate.gate == "rel_l2"), default=None)

    @property
    def used(self) -> float:
        """The share of the deciding gate's budget that was used (1.0 = all); NaN where nothing was compared."""
        gate = self.deciding_gate
        return gate.used if gate is not None else float("nan")


class LatencyRecord(CheckedLine):
    """Measured wall times of one case, in milliseconds, in the order of measurement; `flops`, `bytes` per iteration."""

    kind: Literal["latency"] = "latency"
    case: Shown
    what: Shown
    threads: int = 0
    tp: int = 1
    samples_ms: tuple[float, ...] = ()
    warmup: int = 0
    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def ms(self) -> Statistics | None:
        """Statistics of the samples; None without a sample."""
        return Statistics.of(self.samples_ms) if self.samples_ms else None

    def per_second(self, amount: float) -> float:
        """`amount` per iteration as a rate. At the minimum: interrupted iterations must not change it."""
        return amount / (self.ms.min * 1e-3) if self.ms is not None and self.ms.min > 0 else float("nan")


class CheckRecord(CheckedLine):
    """Every check that is no comparison of tensors: a refusal, determinism, an edge of memory.

    case: the case whose forward and backward the check judges, as `repro` takes it; "" where there is none.
    """

    kind: Literal["check"] = "check"
    name: Shown
    case: Shown = ""
    tp: int = 1


class Selection(JsonLine):
    """Which tests the command line of a run asked for; the defaults are all of them.

    folders: of suites/; isa, cases, tier: the options of these names; rest: the other words that leave tests out, as
    `-k` or a single test's id.
    """

    folders: tuple[str, ...] = ()
    isa: str = "all"
    cases: str | None = None
    tier: str | None = None
    rest: tuple[str, ...] = ()


class RunRecord(TimedLine):
    """The head of a run: where, with what, by which command. `finished` is None while it runs or if it was killed."""

    kind: Literal["run"] = "run"
    stamp: str
    engine: Shown
    command: Shown = ""
    commit: str = ""
    machine: Machine
    workers: int = 1
    started: float = Field(default_factory=time.time)
    finished: float | None = None
    exit_status: int | None = None
    selection: Selection = Selection()
    contract: Shown = ""
    lost: tuple[str, ...] = Field(default=(), description="a sentence for each line that could not be read")

    @property
    def duration_s(self) -> float | None:
        return None if self.finished is None else self.finished - self.started


AnyRecord = AccuracyRecord | LatencyRecord | CheckRecord
R = TypeVar("R", bound=AnyRecord)
AnyLine = RunRecord | AnyRecord
_ADAPTER: TypeAdapter[AnyLine] = TypeAdapter(Annotated[AnyLine, Field(discriminator="kind")])


def parse_line(text: str) -> AnyLine:
    """The record of one JSON line. Raises ValueError with the first thing that is wrong in it."""
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "line"
        raise ValueError(f"not a record: {where}: {first['msg']}") from None


# fields that metrics.Difference has under the same name
_MEASURED = ("mean_rel", "rel_l2", "cosine", "max_abs", "non_finite", "estimated")


def accuracy_record(
    judgement: Judgement, difference: Difference, *, case: Case, repro: str = "", **fields: Any
) -> AccuracyRecord:
    """The record of one tensor that was judged; `fields`: the other fields of the record (family, tensor, engine …)."""
    verdict: Any = judgement.verdict  # the field accepts the enum
    return AccuracyRecord(
        verdict=verdict,
        # the judgement's own repro command has neither engine nor ISA: it is left out where a fuller one is given
        message=judgement.line.partition("\n")[0] if repro else judgement.line,
        case=case.id,
        why=case.why,
        worst_index=tuple(int(i) for i in difference.worst_index),
        gates=tuple(GateRecord.model_validate(gate) for gate in judgement.gates),
        repro=repro,
        **{name: getattr(difference, name) for name in _MEASURED},
        **fields,
    )


def worst_first(records: Iterable[R]) -> list[R]:
    """Sort by verdict, what failed on top; then by how much of the budget was used."""

    def severity(record: R) -> tuple[int, float]:
        used = record.used if isinstance(record, AccuracyRecord) else 0.0
        return (VERDICT_ORDER.index(record.verdict), -_nan_as_inf(used))

    return sorted(records, key=severity)


def _nan_as_inf(used: float) -> float:
    """NaN counts as beyond every budget, so that it sorts to the top."""
    return float("inf") if used != used else used
