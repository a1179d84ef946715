"""The record of a prompt, a JSON line, and the file beside the lines with the settings. Imports no torch.

Times are milliseconds, under the names that users of such pipelines know. They contain neither tokenising nor the time
between calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from ktverify.system.machine import Machine

if TYPE_CHECKING:
    from ktverify.system.timing import Timeline

_MS = 1e6  # nanoseconds
IDENTITY = "identity"  # projectors that change nothing


class _C2cLine(BaseModel):
    model_config = ConfigDict(frozen=True, serialize_by_alias=True)


class PromptTiming(_C2cLine):
    """Milliseconds. projector_calls: one for each pair of layers; decode_step_times_ms: one for each new token.

    decode_total_ms is the sum of the steps; tokens_per_second is of decoding alone. Averages of nothing are 0.
    """

    base_embedding_ms: float
    base_prefill_ms: float
    teacher_embedding_ms: float
    teacher_prefill_ms: float
    projector_total_ms: float
    projector_avg_ms: float
    projector_calls: int
    decode_total_ms: float
    decode_avg_ms: float
    num_generated_tokens: int
    tokens_per_second: float
    decode_step_times_ms: tuple[float, ...]

    @property
    def total_ms(self) -> float:
        """All timed milliseconds of the prompt."""
        return math.fsum(getattr(self, name) for name in STAGE_FIELDS)

    @classmethod
    def of(cls, timeline: Timeline) -> PromptTiming:
        projectors, steps = timeline.times("projector"), timeline.times("decode_step")
        decode = sum(steps)
        return cls(
            base_embedding_ms=sum(timeline.times("base_embedding")) / _MS,
            base_prefill_ms=sum(timeline.times("base_prefill")) / _MS,
            teacher_embedding_ms=sum(timeline.times("teacher_embedding")) / _MS,
            teacher_prefill_ms=sum(timeline.times("teacher_prefill")) / _MS,
            projector_total_ms=sum(projectors) / _MS,
            projector_avg_ms=_mean(projectors) / _MS,
            projector_calls=len(projectors),
            decode_total_ms=decode / _MS,
            decode_avg_ms=_mean(steps) / _MS,
            num_generated_tokens=len(steps),
            tokens_per_second=len(steps) / (decode / 1e9) if decode else 0.0,
            decode_step_times_ms=tuple(step / _MS for step in steps),
        )


# the time of a prompt is the sum of these
STAGE_FIELDS = (
    "base_embedding_ms",
    "base_prefill_ms",
    "teacher_embedding_ms",
    "teacher_prefill_ms",
    "projector_total_ms",
    "decode_total_ms",
)


class ModelPair(_C2cLine):
    base_model: str
    teacher_model: str


class PromptRecord(_C2cLine):
    """One prompt. id: its number in the data set, from 0. The field `models` is written as model_config."""

    id: int
    prompt: str
    response: str
    models: ModelPair = Field(alias="model_config")
    timing: PromptTiming


class C2cSettings(_C2cLine):
    """The common settings of the records in one file. Runs with equal settings may share a file or be merged.

    source: origin of the prompts; start, count: their range; shard k of n: every n-th of the range, from the k-th on.
    projectors: identity, or the file's name and the SHA-256 of its content.
    """

    base_model: str
    teacher_model: str
    projectors: str
    dtype: str
    device: str
    template: bool
    max_new_tokens: int
    source: str
    start: int
    count: int
    shard: tuple[int, int] = (1, 1)

    @property
    def ids(self) -> range:
        """The ids of a finished file, in order."""
        number, of = self.shard
        return range(self.start + number - 1, self.start + self.count, of)

    def differences(self, other: C2cSettings, ignored: Sequence[str] = ()) -> list[str]:
        """ "max_new_tokens 8 and 16", for each field that differs."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{k} {mine[k]} and {theirs[k]}" for k in mine if k not in ignored and mine[k] != theirs[k]]


class Sitting(_C2cLine):
    """One run of the program that wrote to the file. from_id: the first id that it wrote; warmup_ms: its warm-ups.

    others: the share of the processors that other programs had meanwhile, 0 to 1; None if the run was killed.
    """

    stamp: str
    command: str
    commit: str
    machine: Machine
    transformers: str
    threads: int
    from_id: int
    warmup_ms: tuple[float, ...]
    others: float | None = None


class RunInfo(_C2cLine):
    """The file NAME.run.json beside NAME.jsonl."""

    settings: C2cSettings
    sittings: tuple[Sitting, ...]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def as_json(record: PromptRecord) -> dict[str, Any]:
    """The record as in its line."""
    found: dict[str, Any] = record.model_dump(mode="json")
    return found
