"""An engine that is right, and takes its process down in calls that its sizes choose: what a run has to survive."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktverify.engines.torch_bf16 import TorchBf16

# moe_intermediate_size for which the constructor dies; number of tokens for which every forward does
DEADLY_SIZES = (2049, 2048, 1408, 768, 14336, 128, 48, 1, 6)
DEADLY_TOKENS = (15, 16, 17, 31)
# number of tokens for which a forward that is to be saved goes wrong otherwise
HANGS, EATS, EXITS = 33, 100, 300
EXIT_CODE = 3


class Unruly(TorchBf16):
    """torch_bf16, but for the sizes above; with EXITS tokens an unsaved forward prints garbage and is right."""

    def __init__(self, **arguments: Any) -> None:
        if arguments["moe_intermediate_size"] in DEADLY_SIZES:
            _die()
        super().__init__(**arguments)

    def forward_sft(
        self,
        hidden_states: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        save_for_backward: bool = True,
    ) -> Tensor:
        tokens = len(hidden_states)
        if tokens in DEADLY_TOKENS:
            _die()
        if save_for_backward:
            {HANGS: _hang, EATS: _eat, EXITS: _exit}.get(tokens, lambda: None)()
        elif tokens == EXITS:
            for descriptor in (1, 2):
                os.write(descriptor, bytes(range(256)) * 400)
        return super().forward_sft(hidden_states, expert_ids, weights, save_for_backward)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang() -> None:
    print("going to sleep", file=sys.stderr, flush=True)
    while True:
        time.sleep(60)


def _eat() -> None:
    """20 GiB, a piece at a time; a limit that works ends it after the first ones."""
    eaten = [torch.ones(1 << 26) for _ in range(80)]
    raise AssertionError(f"{len(eaten) / 4} GiB were allowed")


def _exit() -> None:
    print("leaving", flush=True)
    os._exit(EXIT_CODE)


class Choosy(TorchBf16):
    """torch_bf16 that names an instruction set of its own."""

    isas = ("avx2",)


class Nothing:
    """Cannot do anything, and says so."""

    def __init__(self, **_: Any) -> None:
        raise NotImplementedError("nothing is done here")


class Raises(TorchBf16):
    """Its forward raises what a contract would call a refusal; it knows no tensor parallelism."""

    def __init__(self, **arguments: Any) -> None:
        if arguments.get("threadpool_count", 1) > 1:
            raise NotImplementedError("tensor parallelism")
        super().__init__(**arguments)

    def forward_sft(self, *_: Any, **__: Any) -> torch.Tensor:
        raise ValueError("this kernel is broken")


class OneDegree(Raises):
    """Right, without tensor parallelism."""

    def forward_sft(self, *arguments: Any, **more: Any) -> torch.Tensor:
        return TorchBf16.forward_sft(self, *arguments, **more)


class Forwards(TorchBf16):
    """Right, and has no backward."""

    def backward(self, grad_output: torch.Tensor) -> Any:
        raise NotImplementedError("no backward yet")


class Leaves(TorchBf16):
    """Ends the program in the middle of a backward, as a script may."""

    def backward(self, grad_output: torch.Tensor) -> Any:
        sys.exit(EXIT_CODE)


class Unclean(TorchBf16):
    """Right, and raises when it is to let go of its buffers."""

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        raise ValueError("not now")


class LeavesUnclean(Leaves):
    """Ends the program in a backward, and raises in the clean-up after it."""

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        raise ValueError("not now")


class DiesInParts(TorchBf16):
    """Right without tensor parallelism; with it, a backward ends the process."""

    stand_alone = str(Path(__file__).with_name("doubling_script.py"))

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._parts = arguments["threadpool_count"]

    def backward(self, grad_output: torch.Tensor) -> Any:
        if self._parts > 1:
            _die()
        return super().backward(grad_output)


class LeavesAtOnce:
    """Ends the program before there is a layer."""

    def __init__(self, **_: Any) -> None:
        sys.exit("no licence")
