"""Engines that end their process instead of computing. Those that compute wrongly stand in suites/meta/mutants."""

from __future__ import annotations

import os
import signal
from typing import Any

from torch import Tensor

from ktverify.engines.torch_bf16 import TorchBf16


class dies(TorchBf16):
    """Ends its process with a signal."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("still alive")
