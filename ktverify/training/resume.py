"""What a checkpoint keeps of its training, and which changes of the configuration a resumed training takes.

A resumed training ends as one that never stopped. So a change that would alter a step is refused, and any other is
accepted and listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktverify.training.config import TrainConfig
from ktverify.training.schedule import learning_rates

# keys that alter no step, or by rounding alone, as those of experts on a GPU. Data and weights are compared by content,
# max_steps and num_train_epochs by what they come to
_HARMLESS = (
    *("model_name_or_path", "trust_remote_code", "dataset", "max_samples", "template", "preprocessing_num_workers"),
    *("kt_num_gpu_experts", "kt_gpu_experts_mask", "kt_gpu_device", "kt_numa_nodes", "kt_ep", "kt_ep_timeout"),
    *("kt_num_threads", "gradient_checkpointing", "logging_steps", "save_steps", "save_total_limit", "stop_on_nan"),
    *("output_dir", "max_steps", "num_train_epochs", "overwrite_output_dir", "resume_from_checkpoint"),
    "kt_weight_path",
)
# of these a difference says nothing
_UNLISTED = ("kt_ep_timeout", "max_steps", "num_train_epochs", "overwrite_output_dir", "resume_from_checkpoint")
_BLOCK = 1 << 16  # bytes that are read at a place of a file of weights


def kept_of(config: TrainConfig, rows: Sequence[Mapping[str, Any]], steps: int, ranks: int = 1) -> dict[str, Any]:
    """What a checkpoint of this training keeps, as JSON: the keys that alter a step and the others, hashes of the
    examples and of the base model, all steps. config: of all `ranks`."""
    keys = config.model_dump(mode="json")
    altering = {name: value for name, value in keys.items() if name not in _HARMLESS and not name.startswith("kt_")}
    altering |= {"lora_alpha": config.alpha, "lora_target": sorted(config.targets)}
    altering |= {"kt_backend": config.kt_backend, "kt_tp_count": config.tp}
    others = {name: value for name, value in keys.items() if name in _HARMLESS and name not in _UNLISTED}
    others |= {"ranks": ranks} if ranks > 1 else {}
    data = {"examples": _hash_of_rows(rows), "base": _hash_of_model(config.model_name_or_path)}
    if config.kt_weight_path:
        data["experts"] = _hash_of_model(config.kt_weight_path)
    return {"altering": altering, "others": others, **data, "steps": steps}


def changes(before: Mapping[str, Any], now: Mapping[str, Any], config: TrainConfig, reached: int) -> str:
    """The accepted changes since the checkpoint at step `reached`, "" for none.

    ValueError, which lists old and new, for changes that would alter the training."""
    refused = _differences(before["altering"], now["altering"])
    for name, key in (("examples", "dataset"), ("base", "model_name_or_path"), ("experts", "kt_weight_path")):
        if before.get(name) != now.get(name):
            old, new = (f"{kept['others'].get(key)} (content {kept.get(name)})" for kept in (before, now))
            refused.append(f"{key} {old} -> {new}")
    accepted = _differences(before["others"], now["others"])
    if before["steps"] != now["steps"]:
        text = f"steps in all {before['steps']} -> {now['steps']}"
        if reached < now["steps"] and _rates_differ(config, before["steps"], now["steps"], reached):
            refused.append(f"{text} (lr_scheduler_type {config.lr_scheduler_type} spreads the learning rate over them)")
        else:
            accepted.append(text)
    if refused:
        raise ValueError(
            f"the checkpoint belongs to another training: {'; '.join(refused)}; give the old values, or begin anew in "
            "another output_dir"
        )
    return "; ".join(accepted)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    # in the order of the configuration; JSON is sorted
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if value is None or isinstance(value, bool | dict) else str(value)


def _rates_differ(config: TrainConfig, before: int, now: int, reached: int) -> bool:
    old, new = learning_rates(config, before), learning_rates(config, now)
    return any(old(step) != new(step) for step in range(reached))


def _hash_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    found = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            found.update(np.asarray(row[name], dtype=np.int64).tobytes() + b"|")
    return found.hexdigest()[:12]


def _hash_of_model(path: str) -> str:
    """A hash of a local model's config.json, of the names and sizes of its files of weights, and of some of their
    bytes: reading hundreds of gigabytes would take longer than loading. A hub's name stands for itself."""
    directory = Path(path)
    if not directory.exists():
        return path
    found = hashlib.sha256()
    parts = ("config.json", "*.safetensors", "*.bin")
    for file in sorted(each for part in parts for each in directory.glob(part)) if directory.is_dir() else [directory]:
        size = file.stat().st_size
        found.update(f"{file.name} {size}|".encode())
        with file.open("rb") as stream:
            for at in range(0, size, max(_BLOCK, size // 64)):
                stream.seek(at)
                found.update(stream.read(_BLOCK))
    return found.hexdigest()[:12]
