"""A profile as a Chrome trace, for ui.perfetto.dev and chrome://tracing.

Comes in: the lines of a profile. Goes out: JSON in the Trace Event Format: complete events ("ph": "X", microseconds)
and names of lanes ("ph": "M").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ktverify.profile.record import CallLine, Line, ProfileLine
from ktverify.profile.summary import stage_name
from ktverify.stages import StageTimes

# Perfetto lays what has thread 0 into the lane whose thread is its process: Python is that one, worker n has n + 2
PID = 1
PYTHON_LANE = PID
FIRST_WORKER = PYTHON_LANE + 1


def trace(lines: Sequence[Line]) -> str:
    """The trace of all recorded calls and, in Python's lane, of the others too."""
    head = next((line for line in lines if isinstance(line, ProfileLine)), None)
    calls = [line for line in lines if isinstance(line, CallLine)]
    workers = max((times.workers for call in calls for times in call.stages), default=0)
    title = f"ktverify profile {head.case}, {head.isa}" if head is not None else "ktverify profile"
    events = [_name("process_name", PYTHON_LANE, title), *_lane(PYTHON_LANE, "Python")]
    for worker in range(workers):
        events += _lane(worker + FIRST_WORKER, f"worker {worker}")
    for call in calls:
        events += _call(call)
    about = {"command": head.command, "isa": head.isa} if head is not None else {}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _name(what: str, lane: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": PID, "tid": lane, "args": {"name": text}}


def _lane(lane: int, text: str) -> list[dict[str, Any]]:
    order = {"ph": "M", "name": "thread_sort_index", "pid": PID, "tid": lane, "args": {"sort_index": lane}}
    return [_name("thread_name", lane, text), order]


def _event(name: str, kind: str, lane: int, ns: tuple[int, int], args: dict[str, Any]) -> dict[str, Any]:
    """ns: begin and duration."""
    begin, length = (value / 1e3 for value in ns)
    return {"ph": "X", "name": name, "cat": kind, "pid": PID, "tid": lane, "ts": begin, "dur": length, "args": args}


def _call(call: CallLine) -> Iterator[dict[str, Any]]:
    """The call and its parts in Python's lane; of its engine calls also the workers."""
    yield _event(call.range, call.which, PYTHON_LANE, (call.at, call.ns), {"pass": call.which})
    for part in call.parts:
        if len(call.parts) > 1:
            yield _event(part.name, "part", PYTHON_LANE, (call.at + part.at, part.ns), {})
        if part.stages is not None:
            yield from _engine(part.stages, call.at + part.at + part.ns)


def _engine(times: StageTimes, end: int) -> Iterator[dict[str, Any]]:
    """An engine call and its workers. The engine does not tell when it began. What Python does around it (checks, new
    tensors) comes before it, so its time is laid at the end of what Python saw."""
    origin = end - times.wall_ns
    yield _event(f"engine {times.direction}", "engine", PYTHON_LANE, (origin, times.wall_ns), _phases(times))
    for worker, spans in enumerate(times.spans):
        for span in spans:
            name, working = stage_name(times, span.stage), span.work_end - span.begin
            yield _event(name, "work", worker + FIRST_WORKER, (origin + span.begin, working), {"stage": span.stage})
            waiting = (origin + span.work_end, span.end - span.work_end)
            yield _event("waiting at the barrier", "wait", worker + FIRST_WORKER, waiting, {"stage": span.stage})


def _phases(times: StageTimes) -> dict[str, Any]:
    """Milliseconds of each phase, which an event shows when it is clicked."""
    return {phase.name: round(phase.wall_ns / 1e6, 4) for phase in times.phases}
