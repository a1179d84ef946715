"""export-merged: the base model with an adapter merged into its weights, as an ordinary checkpoint.

Comes in: an adapter's directory and a directory to write. Stock transformers and peft do it; the engine has no part.
"""

from __future__ import annotations

from pathlib import Path

from ktverify.training.adapter import load_adapter
from ktverify.training.place import whole_directory
from ktverify.training.run import base_of, load_base


def export_merged(
    adapter: Path, out: Path, *, base: str | None = None, dtype: str = "bfloat16", trust: bool = False
) -> Path:
    """Write base + adapter to `out`, whole or not at all. base: default is the one that the adapter names.

    dtype: of the weights written; bfloat16 rounds the sum once. ValueError for a directory in use, or no adapter."""
    if out.exists():
        raise ValueError(f"{out} exists: name another directory")
    model, tokenizer = load_base(base_of(adapter, base), dtype, option="--base", trust=trust)
    merged = load_adapter(model, adapter).merge_and_unload()
    with whole_directory(out) as part:
        merged.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
    return out
