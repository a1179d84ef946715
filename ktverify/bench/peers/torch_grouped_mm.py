"""torch.nn.functional.grouped_mm over the sorted rows, gradients by autograd: the engine torch_grouped_mm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ktverify.bench.peers.torch_loop import BACKWARD, HELD, LAZY, LORA, NEEDS, PACKAGE

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "torch grouped_mm"
__all__ = ["BACKWARD", "HELD", "LAZY", "LORA", "NEEDS", "PACKAGE", "TITLE", "load"]


def load(inputs: BenchInputs) -> Any:
    from ktverify.engines.torch_grouped_mm import TorchGroupedMm

    return inputs.layer(TorchGroupedMm, copied=("down_proj",))
