"""An engine that doubles its outputs, with a script that does so only for more than 11 tokens."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ktverify.engines.torch_bf16 import TorchBf16


class Doubling(TorchBf16):
    """torch_bf16 with outputs twice as large."""

    stand_alone = str(Path(__file__).with_name("doubling_script.py"))

    def forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> Tensor:
        return 2 * super().forward_sft(hidden_states, expert_ids, weights, save_for_backward)


class NoFile(TorchBf16):
    """Names a script that is not there."""

    stand_alone = "/no/such/run.py"
