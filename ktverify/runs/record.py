"""The one record: what a check found, as one line of JSON.

Comes in: numbers and verdicts from the suites, `repro`, `verify` and the bench. Goes out: JSON lines that every printer
of this package (console, Markdown, HTML, gate) reads. A new printer needs no new record; a new kind of check adds a
field with a default, so that old runs stay readable.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from ktverify.system.machine import Machine

VerdictName = Literal["PASS", "FAIL", "CRASH", "TIMEOUT", "OOM", "SKIP", "UNSUPPORTED", "MISTRUSTED"]

# worst first: the order of every table. What did not run stands last, it has no numbers to look at
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

# nothing was computed, so there is neither a pass nor a failure to tell
NOT_RUN: frozenset[str] = frozenset({"SKIP", "UNSUPPORTED"})


class _Line(BaseModel):
    """What all lines have in common. NaN and Inf are written as strings, so that every JSON reader takes the file."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", frozen=True)

    at: float = Field(default_factory=time.time, description="seconds since 1970, when the record was made")
    worker: str = Field(default="", description="the pytest-xdist worker that made it; empty without xdist")


class GateRecord(BaseModel):
    """One gate of one tensor: `value` against `budget`; `used` is their ratio (1.0 = all of the budget)."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", frozen=True, from_attributes=True)

    gate: str
    value: float
    budget: float
    used: float
    verdict: VerdictName
    reason: str = ""

    @field_validator("verdict", mode="before")
    @classmethod
    def _enum_to_name(cls, value: object) -> object:
        return getattr(value, "value", value)


class _Checked(_Line):
    """A line that carries a verdict."""

    family: str
    engine: str
    isa: str = ""
    verdict: VerdictName
    message: str = ""
    repro: str = ""
    duration_s: float = 0.0

    @field_validator("verdict", mode="before")
    @classmethod
    def _enum_to_name(cls, value: object) -> object:
        return getattr(value, "value", value)


class AccuracyRecord(_Checked):
    """One tensor of one case against its oracle. `rel_l2`, `mean_rel`, `cosine`: no unit; `max_abs`: the tensor's."""

    kind: Literal["accuracy"] = "accuracy"
    case: str
    why: str = ""
    tensor: str
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

    @model_validator(mode="after")
    def _verdict_agrees(self) -> AccuracyRecord:
        failed = [gate.gate for gate in self.gates if gate.verdict not in ("PASS", *NOT_RUN)]
        if self.verdict == "PASS" and failed:
            raise ValueError(f"verdict is PASS although gate {failed[0]} is not")
        return self

    @property
    def deciding_gate(self) -> GateRecord | None:
        """The gate that failed, or the one that came nearest to its budget; None where nothing was compared."""
        failed = [gate for gate in self.gates if gate.verdict not in ("PASS", *NOT_RUN)]
        # how alive the expected values are is no error, so it uses up no budget
        asked = failed or [gate for gate in self.gates if gate.gate != "trust"]
        return max(asked, key=lambda gate: (_finite(gate.used), gate.gate == "rel_l2"), default=None)

    @property
    def used(self) -> float:
        """The share of the deciding gate's budget that was used (1.0 = all); NaN where nothing was compared."""
        gate = self.deciding_gate
        return gate.used if gate is not None else float("nan")


class LatencyRecord(_Checked):
    """Measured wall times of one case, in milliseconds, in the order of measurement; `flops`, `bytes` per iteration."""

    kind: Literal["latency"] = "latency"
    case: str
    what: str
    threads: int = 0
    tp: int = 1
    samples_ms: tuple[float, ...] = ()
    warmup: int = 0
    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def mean_ms(self) -> float:
        return statistics.fmean(self.samples_ms) if self.samples_ms else float("nan")

    @property
    def std_ms(self) -> float:
        """Sample standard deviation (n - 1)."""
        return statistics.stdev(self.samples_ms) if len(self.samples_ms) > 1 else 0.0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms) if self.samples_ms else float("nan")

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms, default=float("nan"))

    @property
    def max_ms(self) -> float:
        return max(self.samples_ms, default=float("nan"))

    # rates come from the median: one interrupted iteration must not change them
    @property
    def tokens_per_s(self) -> float:
        return _rate(self.tokens, self.median_ms)

    @property
    def gflop_per_s(self) -> float:
        return _rate(self.flops, self.median_ms) / 1e9

    @property
    def gbyte_per_s(self) -> float:
        return _rate(self.bytes, self.median_ms) / 1e9


class CheckRecord(_Checked):
    """Every check that is no comparison of tensors: a refusal, determinism, a meta test.

    case: that of whose one forward and backward the check judges, as `repro` takes it; "" where there is no such one.
    """

    kind: Literal["check"] = "check"
    name: str
    case: str = ""
    tp: int = 1


class RunRecord(_Line):
    """The head of a run: where, with what, by which command. `finished` is None while it runs or if it was killed."""

    kind: Literal["run"] = "run"
    stamp: str
    engine: str
    command: str = ""
    commit: str = ""
    machine: Machine
    workers: int = 1
    started: float = Field(default_factory=time.time)
    finished: float | None = None
    exit_status: int | None = None

    @property
    def duration_s(self) -> float | None:
        return None if self.finished is None else self.finished - self.started


Result = AccuracyRecord | LatencyRecord | CheckRecord
Record = Annotated[RunRecord | AccuracyRecord | LatencyRecord | CheckRecord, Field(discriminator="kind")]

_ADAPTER: TypeAdapter[Any] = TypeAdapter(Record)


def parse_line(text: str) -> RunRecord | Result:
    """One JSON line to its record. Raises ValueError with the first thing that is wrong in it."""
    try:
        record: RunRecord | Result = _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "line"
        raise ValueError(f"not a record: {where}: {first['msg']}") from None
    return record


def accuracy_record(
    judgement: Any,
    difference: Any,
    *,
    family: str,
    case: Any,
    tensor: str,
    engine: str,
    isa: str = "",
    threads: int = 0,
    tp: int = 1,
    source: str = "golden",
    duration_s: float = 0.0,
    repro: str = "",
) -> AccuracyRecord:
    """The record of one `gates.Judgement` of one `metrics.Difference` for a `cases.Case`."""
    return AccuracyRecord(
        family=family,
        engine=engine,
        isa=isa,
        verdict=judgement.verdict,
        # the line's own repro command knows neither engine nor ISA; where a fuller one is given it stands alone
        message=judgement.line.partition("\n")[0] if repro else judgement.line,
        duration_s=duration_s,
        case=case.id,
        why=case.why,
        tensor=tensor,
        threads=threads,
        tp=tp,
        source=source,
        mean_rel=difference.mean_rel,
        rel_l2=difference.rel_l2,
        cosine=difference.cosine,
        max_abs=difference.max_abs,
        worst_index=tuple(int(i) for i in difference.worst_index),
        non_finite=difference.non_finite,
        estimated=difference.estimated,
        gates=tuple(GateRecord.model_validate(gate) for gate in judgement.gates),
        repro=repro,
    )


def severity(record: Result) -> tuple[int, float]:
    """Sort key, worst first: by verdict, then by how much of the budget was used."""
    used = record.used if isinstance(record, AccuracyRecord) else 0.0
    return (VERDICT_ORDER.index(record.verdict), -_finite(used))


def worst_first(records: Iterable[Result]) -> list[Result]:
    """What failed on top, then what came nearest to its budget."""
    return sorted(records, key=severity)


def _finite(used: float) -> float:
    """NaN counts as beyond every budget, so that it sorts to the top."""
    return float("inf") if used != used else used


def _rate(amount: float, milliseconds: float) -> float:
    return amount / (milliseconds * 1e-3) if milliseconds > 0 else float("nan")
