"""One prompt's timeline as a Chrome trace, for ui.perfetto.dev and chrome://tracing.

A lane each for base, teacher, projectors and decoding. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

from ktverify.bench.c2c.record import PromptRecord
from ktverify.bench.c2c.stages import LANES
from ktverify.report import trace_events
from ktverify.system.timing import TimedCall


def trace(record: PromptRecord, spans: Sequence[TimedCall]) -> str:
    """The trace of one prompt, as JSON."""
    lanes = {lane: place for place, lane in enumerate(dict.fromkeys(LANES.values()), start=trace_events.FIRST_LANE)}
    models = record.models.model_dump()
    events = [trace_events.title(f"{models['base_model']} taught by {models['teacher_model']}")]
    for name, lane in lanes.items():
        events += trace_events.lane(lane, name)
    for span in spans:
        where = lanes[LANES[span.name]]
        events.append(trace_events.span(span.name, "c2c", where, (span.at, span.ns), {"call": span.number}))
    about = {"id": record.id, "prompt": record.prompt, "response": record.response, **models}
    return trace_events.document(events, about)
