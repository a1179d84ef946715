"""export-merged: the base model with an adapter merged into its weights, as an ordinary checkpoint.

Stock transformers and peft do the work, without the engine.
"""

from __future__ import annotations

from pathlib import Path

from ktverify.training.adapter import load_adapter
from ktverify.training.output_directory import whole_directory
from ktverify.training.pretrained import load_pretrained
from ktverify.training.run import base_of


def export_merged(
    adapter: Path, out: Path, *, base: str | None = None, dtype: str = "bfloat16", trust: bool = False
) -> Path:
    """Write base + adapter to `out`, whole or not at all, and return `out`.

    base: the base model's path, by default the one that the adapter names. dtype: of the written weights; bfloat16
    rounds the sum once. ValueError where `out` exists or `adapter` is none.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name another directory")
    model, tokenizer = load_pretrained(base_of(adapter, base), dtype, option="--base", trust=trust)
    merged = load_adapter(model, adapter).merge_and_unload()
    with whole_directory(out) as part:
        merged.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
    return out
