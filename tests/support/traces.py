"""Reads traces back: checks the Trace Event Format as Perfetto's importer reads it."""

from __future__ import annotations

import json
from typing import Any


def read_trace(text: str) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """(names of the lanes, complete events) of a trace in JSON object form. Every lane has a name and an event."""
    named: dict[int, str] = {}
    calls: list[dict[str, Any]] = []
    for event in json.loads(text)["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        # thread 0 would share the lane of the thread that has the process's number
        assert event["tid"] > 0
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            if event["name"] == "thread_name":
                named[event["tid"]] = event["args"]["name"]
            continue
        assert event["ph"] == "X"
        assert "cat" in event
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        calls.append(event)
    assert {event["tid"] for event in calls} == set(named)
    for lane in named:
        nested([(event["ts"], event["ts"] + event["dur"]) for event in calls if event["tid"] == lane])
    return named, calls


def nested(events: list[tuple[float, float]]) -> None:
    """Events of one lane contain or follow each other; a viewer drops what overlaps. Microseconds, up to rounding."""
    slack = 1e-3
    open_: list[float] = []
    for begin, end in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1] <= begin + slack:
            open_.pop()
        assert not open_ or end <= open_[-1] + slack, f"{begin} to {end} overlaps an event that ends at {open_[-1]}"
        open_.append(end)
