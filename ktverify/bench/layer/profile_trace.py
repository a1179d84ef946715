"""A profile as a Chrome trace, for ui.perfetto.dev and chrome://tracing: a lane for Python, one for each worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ktverify.bench.layer.profile_record import CallLine, Line, ProfileLine
from ktverify.bench.layer.profile_summary import stage_name
from ktverify.engines.native.phase_times import StageTimes
from ktverify.report import trace_events

PYTHON_LANE = trace_events.FIRST_LANE
FIRST_WORKER = PYTHON_LANE + 1


def trace(lines: Sequence[Line]) -> str:
    """The trace as JSON: all calls in Python's lane, the recorded ones in the workers' lanes too."""
    head = next((line for line in lines if isinstance(line, ProfileLine)), None)
    calls = [line for line in lines if isinstance(line, CallLine)]
    workers = max((times.workers for call in calls for times in call.stages), default=0)
    title = f"ktverify profile {head.case}, {head.isa}" if head is not None else "ktverify profile"
    events = [trace_events.title(title), *trace_events.lane(PYTHON_LANE, "Python")]
    for worker in range(workers):
        events += trace_events.lane(worker + FIRST_WORKER, f"worker {worker}")
    for call in calls:
        events += _call(call)
    about = {"command": head.command, "isa": head.isa} if head is not None else {}
    return trace_events.document(events, about)


def _call(call: CallLine) -> Iterator[dict[str, Any]]:
    """Events of a call and its parts in Python's lane, and of its engine calls in the workers' lanes."""
    yield trace_events.span(call.range, call.which, PYTHON_LANE, (call.at, call.ns), {"pass": call.which})
    for part in call.parts:
        if len(call.parts) > 1:
            yield trace_events.span(part.name, "part", PYTHON_LANE, (call.at + part.at, part.ns), {})
        if part.stages is not None:
            yield from _engine(part.stages, call.at + part.at + part.ns)


def _engine(times: StageTimes, end: int) -> Iterator[dict[str, Any]]:
    """Events of an engine call and its workers. The engine does not report when it began. What Python does around it
    (checks, new tensors) comes before it, so the call is drawn at the end of what Python saw."""
    origin = end - times.wall_ns
    yield trace_events.span(f"engine {times.direction}", "engine", PYTHON_LANE, (origin, times.wall_ns), _phases(times))
    for lane, spans in enumerate(times.spans, start=FIRST_WORKER):
        for span in spans:
            name, working = stage_name(times, span.stage), span.work_end - span.begin
            yield trace_events.span(name, "work", lane, (origin + span.begin, working), {"stage": span.stage})
            waiting = (origin + span.work_end, span.end - span.work_end)
            yield trace_events.span("waiting at the barrier", "wait", lane, waiting, {"stage": span.stage})


def _phases(times: StageTimes) -> dict[str, Any]:
    """Milliseconds of each phase, which an event shows when it is clicked."""
    return {phase.name: round(phase.wall_ns / 1e6, 4) for phase in times.phases}
