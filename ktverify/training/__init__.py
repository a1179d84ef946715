"""The engine in real models: under Hugging Face MoE models, with stock transformers and peft. docs/training.md.

Comes in: a model that uses transformers' experts interface. Goes out: the same model, its routed experts computed by
the engine, forward and backward. Light until one of its names is used: `python -m ktverify --help` imports it.
"""

from __future__ import annotations

import importlib
from typing import Any

_ROOMS = {
    "MOEAMXFunction": "function",
    "MOELayerWrapper": "layer",
    "CpuInfer": "layer",
    "init_cpu_infer": "layer",
    "wrap_moe_layers": "wrap",
    "update_lora_pointers": "wrap",
    "add_adapter": "adapter",
    "load_adapter": "adapter",
    "lora_config": "adapter",
}
__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
