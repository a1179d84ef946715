"""A copied or unpickled engine, of what makes it: arguments, base weights, LoRA parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ktverify.spec.names import BASE_NAMES


def made_again(
    engine: Callable[..., Any],
    arguments: dict[str, Any],
    base: dict[str, torch.Tensor] | None,
    lora: list[torch.Tensor] | None,
) -> Any:
    """A layer of the class `engine`: its arguments, base weights by logical expert, LoRA parameters."""
    made = engine(**arguments)
    if base is not None:
        gate, up, down = (base.pop(name) for name in BASE_NAMES)
        made.load_weights_from_tensors(gate, up, down, torch.arange(made.spec.num_experts, device="cpu"))
    if lora is not None:
        made.init_lora_weights(*lora)
    return made
