"""transformers' own loop over the experts of Qwen3-MoE, LoRA added to the weights as peft does: the engine
transformers_experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ktverify.bench.peers.torch_loop import BACKWARD, LAZY, LORA, NEEDS

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "transformers"
PACKAGE = "transformers"
HELD = 4.1  # a call adds LoRA to a copy of the weights, and autograd makes their gradient
__all__ = ["BACKWARD", "HELD", "LAZY", "LORA", "NEEDS", "PACKAGE", "TITLE", "load"]


def load(inputs: BenchInputs) -> Any:
    from ktverify.engines.transformers_experts import TransformersExperts

    return inputs.layer(TransformersExperts)
