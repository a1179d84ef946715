"""Which checkpoints of a run are complete.

The Trainer writes a checkpoint file by file, trainer_state.json last, and may be killed in between. A checkpoint is
complete if all its files can be read; only such a checkpoint is resumed from.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

NEEDED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def step_of(checkpoint: Path) -> int:
    """50 for checkpoint-50; -1 for another name."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found.group(1)) if found else -1


def problem_of(checkpoint: Path) -> str:
    """Why a run cannot be resumed from this checkpoint; "" if it can."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers.trainer_pt_utils import safe_globals

    for name in NEEDED:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        for name in ("adapter_config.json", "trainer_state.json"):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        name = "adapter_model.safetensors"
        with safe_open(checkpoint / name, framework="pt") as stored:
            stored.keys()
        with safe_globals():  # numpy's random state
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except (ValueError, SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        return f"{name} cannot be read ({' '.join(str(error).split())[:80]})"
    return ""


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a run, newest first, complete or not."""
    found = [path for path in directory.glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def choose(wanted: bool | str, directory: Path) -> Path:
    """The checkpoint to resume from: `wanted` if it is a path, else the newest complete one in `directory`.

    ValueError, with the problem of each checkpoint, where there is none."""
    if isinstance(wanted, str) and not Path(wanted).is_dir():
        raise ValueError(
            f"there is no checkpoint {wanted}: resume_from_checkpoint takes true, or a checkpoint's directory"
        )
    candidates = [Path(wanted)] if isinstance(wanted, str) else checkpoints_in(directory)
    reasons = []
    for path in candidates:
        reason = problem_of(path)
        if not reason:
            return path
        reasons.append(f"{path.name}: {reason}")
    if not candidates:
        raise ValueError(f"{directory} holds no checkpoint to resume from: begin anew with overwrite_output_dir: true")
    raise ValueError(f"no whole checkpoint to resume from; {'; '.join(reasons)}")
