"""The options that single, batch and dataset share. Light: help needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# the pair that the pipeline was made for
BASE, TEACHER = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Base"


def named(name: str, text: str, **more: Any) -> typer.models.OptionInfo:
    """--max_new_tokens, as the field writes it; `bench` takes --max-new-tokens for the same."""
    found: typer.models.OptionInfo = typer.Option(f"--{name}", help=text, **more)
    return found


BaseModel = Annotated[str, named("base_model", "the model that answers: a directory or a hub's name")]
TeacherModel = Annotated[str, named("teacher_model", "the model whose cache it receives")]
ProjectorFile = Annotated[
    Path | None, named("projectors", "a safetensors file of projectors (default: the identity on the base)")
]
MaxNewTokens = Annotated[int, named("max_new_tokens", "tokens of a response at most", min=1)]
Warmup = Annotated[int, named("warmup_steps", "short runs of the first prompt that count nowhere", min=0)]
Dtype = Annotated[str, named("dtype", "of both models: bfloat16 or float32")]
Device = Annotated[str, named("device", "of both models: cpu or cuda")]
Template = Annotated[bool, typer.Option("--template/--no-template", help="put prompts into the chat templates")]
Output = Annotated[
    Path | None, named("output", "the file of records, NAME.jsonl (default: reports/runs/<stamp>-c2c/timing.jsonl)")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object instead of tables")]
