"""Run the routed experts of Hugging Face MoE models in the engine, with stock transformers and peft. docs/training.md.

`wrap_moe_layers` takes a model that uses transformers' experts interface; the engine then computes forward and backward
of its routed experts. Importing the package is light: a public name imports its module on first use.
"""

from __future__ import annotations

from typing import Any

from ktverify.system import lazy_attribute

_MODULES = {
    "MOEAMXFunction": "layer",
    "MOELayerWrapper": "layer",
    "CpuInfer": "infer",
    "GpuExperts": "gpu_experts",
    "init_cpu_infer": "infer",
    "load_model": "pretrained",
    "wrap_moe_layers": "wrap",
    "update_lora_pointers": "wrap",
    "capturing": "capture",
    "add_adapter": "adapter",
    "load_adapter": "adapter",
    "lora_config": "adapter",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, {key: f"{__name__}.{module}:{key}" for key, module in _MODULES.items()}, name)
