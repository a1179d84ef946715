"""Events in Chrome's Trace Event Format, for ui.perfetto.dev and chrome://tracing: complete events ("ph": "X", times in
microseconds) and names of lanes ("ph": "M"). No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# Perfetto draws thread 0 in the lane of the thread that has its process's number: lanes count from that number
PID = 1
FIRST_LANE = PID

Event = dict[str, Any]


def title(text: str) -> Event:
    """The title above all lanes."""
    return {"ph": "M", "name": "process_name", "pid": PID, "tid": FIRST_LANE, "args": {"name": text}}


def lane(number: int, text: str) -> list[Event]:
    """A lane's name, and its place among the others."""
    about = {"thread_name": {"name": text}, "thread_sort_index": {"sort_index": number}}
    return [{"ph": "M", "name": name, "pid": PID, "tid": number, "args": args} for name, args in about.items()]


def span(name: str, kind: str, lane: int, ns: tuple[int, int], args: dict[str, Any]) -> Event:
    """One call in a lane. ns: begin and duration; args: shown when it is clicked."""
    begin, length = (value / 1e3 for value in ns)
    return {"ph": "X", "name": name, "cat": kind, "pid": PID, "tid": lane, "ts": begin, "dur": length, "args": args}


def document(events: Sequence[Event], about: dict[str, Any]) -> str:
    """The file as text; about: metadata for the viewer."""
    return json.dumps({"traceEvents": list(events), "displayTimeUnit": "ms", "otherData": about})
