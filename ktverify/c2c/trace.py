"""One prompt's timeline as a Chrome trace, for ui.perfetto.dev and chrome://tracing.

Comes in: spans. Goes out: JSON in the Trace Event Format: complete events ("ph": "X", microseconds) in a lane each for
base, teacher, projectors and decoding, and the lanes' names ("ph": "M"). No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ktverify.c2c.record import Record
from ktverify.c2c.timeline import LANES, Span

PID = 1


def trace(record: Record, spans: Sequence[Span]) -> str:
    """The trace of the prompt that `record` tells of."""
    lanes = {lane: place for place, lane in enumerate(dict.fromkeys(LANES.values()))}
    models = record.models.model_dump()
    events = [_name("process_name", 0, f"{models['base_model']} taught by {models['teacher_model']}")]
    for lane, place in lanes.items():
        order = {"ph": "M", "name": "thread_sort_index", "pid": PID, "tid": place, "args": {"sort_index": place}}
        events += [_name("thread_name", place, lane), order]
    events += [_event(span, lanes[LANES[span.stage]]) for span in spans]
    about = {"id": record.id, "prompt": record.prompt, "response": record.response, **models}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _name(what: str, lane: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": PID, "tid": lane, "args": {"name": text}}


def _event(span: Span, lane: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.stage,
        "cat": "c2c",
        "pid": PID,
        "tid": lane,
        "ts": span.at / 1e3,
        "dur": span.ns / 1e3,
        "args": {"call": span.number},
    }
