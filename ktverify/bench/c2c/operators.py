"""Which operators a prompt's time goes to, by torch's profiler.

Comes in: a pipeline and a prompt. Goes out: a row an operator, and the profiler's own trace. Profiling takes time
itself, so this is a run of its own behind the timed one, of few tokens, and none of its times goes into a record.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktverify.bench.c2c.pipeline import Pipeline
from ktverify.bench.c2c.stages import LANES
from ktverify.bench.c2c.tables import figure
from ktverify.bench.tables import Grid
from ktverify.system.timing import Timeline

SHOWN = 10


@dataclass(frozen=True)
class Operator:
    """self_ms: without the operators that it calls, on the GPU where there is one; total_ms: with them, on the CPU."""

    name: str
    calls: int
    self_ms: float
    total_ms: float
    share: float


@dataclass(frozen=True)
class Profile:
    """Operators, the one that took longest first, over `tokens` new tokens; trace: the profiler's, with the stages."""

    operators: tuple[Operator, ...]
    tokens: int
    trace: bytes


def profile(pipeline: Pipeline, prompt: str, tokens: int, device: str) -> Profile:
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
    return Profile(_operators(averages, device), len(response.tokens), _trace(found))


def _operators(averages: list[Any], device: str) -> tuple[Operator, ...]:
    own = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    total = sum(getattr(average, own) for average in averages) or 1
    rows = [
        Operator(a.key, int(a.count), getattr(a, own) / 1e3, a.cpu_time_total / 1e3, getattr(a, own) / total)
        for a in averages
    ]
    return tuple(sorted(rows, key=lambda row: (-row.self_ms, row.name)))


def _trace(found: Any) -> bytes:
    """The profiler writes to a path only."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "trace.json"
        found.export_chrome_trace(str(path))
        return path.read_bytes()


def table(found: Profile) -> str:
    """Tab-separated, a row an operator; times in milliseconds."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["operator", "calls", "self_ms", "total_ms", "share"])
    for row in found.operators:
        writer.writerow([row.name, row.calls, f"{row.self_ms:.3f}", f"{row.total_ms:.3f}", f"{row.share:.4f}"])
    return stream.getvalue()


def grid(found: Profile) -> Grid:
    """The operators that took longest."""
    rows = tuple(
        (row.name, figure(row.self_ms), f"{100 * row.share:.1f}", str(row.calls), figure(1e3 * row.self_ms / row.calls))
        for row in found.operators[:SHOWN]
    )
    title = f"operators, over {found.tokens} tokens in a run of its own under the profiler"
    return Grid(title, (), ("operator", "self ms", "%", "calls", "µs a call"), rows)
