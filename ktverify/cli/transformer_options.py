"""The options that `bench transformer` and `bench memory` share. Light: help needs no torch."""

from __future__ import annotations

from typing import Annotated

import typer


def _named(name: str, text: str) -> typer.models.OptionInfo:
    """--context_length, as the field writes it; `bench` takes --context-length for the same."""
    found: typer.models.OptionInfo = typer.Option(f"--{name}", help=text, min=1)
    return found


Preset = Annotated[str, typer.Argument(metavar="PRESET", help="small, medium, large, xl or 2.7b")]
ContextLength = Annotated[int, _named("context_length", "tokens a sequence")]
BatchSize = Annotated[int, _named("batch_size", "sequences")]
VocabSize = Annotated[int, _named("vocab_size", "rows of the embedding and of the output head")]
DModel = Annotated[int | None, _named("d_model", "width (default: the preset's, as all sizes)")]
DFf = Annotated[int | None, _named("d_ff", "width inside SwiGLU")]
NumLayers = Annotated[int | None, _named("num_layers", "layers")]
NumHeads = Annotated[int | None, _named("num_heads", "attention heads")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16")]
Attention = Annotated[str, typer.Option("--attention", help="plain writes the scores out; fused is torch's own")]

# those of them, by name, that are fields of a ModelSize
SIZES = (
    "context_length",
    "batch_size",
    "d_model",
    "d_ff",
    "num_layers",
    "num_heads",
    "vocab_size",
    "rope_theta",
    "dtype",
    "attention",
)
