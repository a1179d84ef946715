"""export-merged: the base model with an adapter merged into its weights, as an ordinary checkpoint.

Comes in: an adapter's directory and a directory to write. Stock transformers and peft do it; the engine has no part.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from ktverify.training.adapter import load_adapter
from ktverify.training.run import load_base


def export_merged(adapter: Path, out: Path, *, base: str | None = None, dtype: str = "bfloat16") -> Path:
    """Write base + adapter to `out`, whole or not at all. base: default is the one that the adapter names.

    dtype: of the weights written; bfloat16 rounds the sum once. ValueError for a directory in use, or no adapter."""
    if out.exists():
        raise ValueError(f"{out} exists: name another directory")
    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise ValueError(f"{adapter} holds no adapter: adapter_config.json is missing")
    path = base or json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not path:
        raise ValueError(f"{adapter} does not name its base model: give --base")
    model, tokenizer = load_base(path, dtype)
    merged = load_adapter(model, adapter).merge_and_unload()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        merged.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        part.chmod(0o755)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return out
