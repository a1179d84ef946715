"""Which operators a prompt's time goes to, by torch's profiler.

Profiling takes time itself: it is a separate run of few tokens after the timed one, and none of its times goes into a
record.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ktverify.bench.c2c.pipeline import Pipeline
from ktverify.bench.c2c.stages import LANES
from ktverify.report.grid import Grid, delimited
from ktverify.report.numbers import number, percent
from ktverify.system.timing import Timeline

SHOWN = 10


@dataclass(frozen=True)
class Operator:
    """self_ms: without the operators that it calls, on the GPU where there is one; total_ms: with them, on the CPU."""

    operator: str
    calls: int
    self_ms: float
    total_ms: float
    share: float


@dataclass(frozen=True)
class OperatorProfile:
    """Operators, the one that took longest first, over `tokens` new tokens; trace: the profiler's, with the stages."""

    operators: tuple[Operator, ...]
    tokens: int
    trace: bytes


def profile(pipeline: Pipeline, prompt: str, tokens: int, device: str) -> OperatorProfile:
    """Run `prompt` under the profiler for at most `tokens` new tokens."""
    # else the profiler writes lines of its own to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch import profiler

    activities = [profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(profiler.ProfilerActivity.CUDA)
    with profiler.profile(activities=activities) as found:
        response = pipeline.run(prompt, tokens, Timeline(device, annotate=profiler.record_function))
    averages = [average for average in found.key_averages() if average.key not in LANES]
    return OperatorProfile(_operators(averages, device), len(response.tokens), _trace(found))


def _operators(averages: list[Any], device: str) -> tuple[Operator, ...]:
    own = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    total = sum(getattr(average, own) for average in averages) or 1
    rows = [
        Operator(a.key, int(a.count), getattr(a, own) / 1e3, a.cpu_time_total / 1e3, getattr(a, own) / total)
        for a in averages
    ]
    return tuple(sorted(rows, key=lambda row: (-row.self_ms, row.operator)))


def _trace(found: Any) -> bytes:
    """The profiler writes to a path only."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "trace.json"
        found.export_chrome_trace(str(path))
        return path.read_bytes()


def table(found: OperatorProfile) -> str:
    """Tab-separated, a row per operator; times in milliseconds."""
    return delimited([asdict(row) for row in found.operators])


def grid(found: OperatorProfile) -> Grid:
    """The operators that took longest."""
    rows = tuple(
        (row.operator, number(row.self_ms), percent(row.share), str(row.calls), number(1e3 * row.self_ms / row.calls))
        for row in found.operators[:SHOWN]
    )
    title = f"operators, over {found.tokens} tokens in a separate run under the profiler"
    return Grid(title, (), ("operator", "self ms", "share", "calls", "µs a call"), rows)
