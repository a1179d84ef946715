"""The stages of the pipeline, in the lane of a trace that each belongs to. Light."""

from __future__ import annotations

LANES: dict[str, str] = {
    "base_embedding": "base",
    "base_prefill": "base",
    "teacher_embedding": "teacher",
    "teacher_prefill": "teacher",
    "projector": "projectors",
    "decode_step": "decode",
}
