"""torch, a loop over experts, gradients by autograd: the engine torch_bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "torch loop"
PACKAGE = "torch"
HELD = 1.05
LAZY = False
BACKWARD = True
LORA = True
NEEDS = ""


def load(inputs: BenchInputs) -> Any:
    from ktverify.engines.torch_bf16 import TorchBf16

    return inputs.layer(TorchBf16, copied=("gate_proj", "up_proj", "down_proj"))
