"""Engines that end their process instead of computing. Those that compute wrongly stand in ktverify/mutants."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ktverify.engines.torch_bf16 import TorchBf16

TOLD = "KTVERIFY_SUITES_TOLD"


class dies(TorchBf16):
    """Ends its process with a signal."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("still alive")


class leaves_a_process(dies):
    """The same, and leaves another that sleeps with all of its files open; its number is told in the file TOLD."""

    session = False

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        left = os.fork()
        if left == 0:
            if self.session:
                os.setsid()
            time.sleep(60)
            os._exit(0)
        Path(os.environ[TOLD]).write_text(str(left))
        return super().forward_sft(*args, **kwargs)


class leaves_a_session(leaves_a_process):
    """The same, and the other leads a session of its own, where nobody can find it."""

    session = True


def sleeps(seconds: float) -> None:
    """No engine: a call that takes long."""
    time.sleep(seconds)
