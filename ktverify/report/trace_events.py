"""Chrome's Trace Event Format, as ui.perfetto.dev and chrome://tracing read it.

Comes in: lanes and spans. Goes out: JSON of complete events ("ph": "X", microseconds) and names of lanes ("ph": "M").
No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# Perfetto lays what has thread 0 into the lane whose thread is its process: lanes count from the process's own
PID = 1
FIRST_LANE = PID

Event = dict[str, Any]


def title(text: str) -> Event:
    """What stands above all lanes."""
    return {"ph": "M", "name": "process_name", "pid": PID, "tid": FIRST_LANE, "args": {"name": text}}


def lane(number: int, text: str) -> list[Event]:
    """A lane's name, and its place among the others."""
    about = {"thread_name": {"name": text}, "thread_sort_index": {"sort_index": number}}
    return [{"ph": "M", "name": name, "pid": PID, "tid": number, "args": args} for name, args in about.items()]


def span(name: str, kind: str, lane: int, ns: tuple[int, int], args: dict[str, Any]) -> Event:
    """ns: begin and duration."""
    begin, length = (value / 1e3 for value in ns)
    return {"ph": "X", "name": name, "cat": kind, "pid": PID, "tid": lane, "ts": begin, "dur": length, "args": args}


def document(events: Sequence[Event], about: dict[str, Any]) -> str:
    """The whole file; about: what a viewer shows as metadata."""
    return json.dumps({"traceEvents": list(events), "displayTimeUnit": "ms", "otherData": about})
