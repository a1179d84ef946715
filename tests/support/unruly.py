"""Engines that end their process, raise or name a wrong script: what a run has to survive."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import MappingProxyType
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
# the variable that names the file of LeavesAProcess
PID_FILE = "KTVERIFY_TESTS_PID_FILE"


class Unruly(TorchBf16):
    """torch_bf16, but for the sizes above; with EXITS tokens an unsaved forward prints garbage and is right."""

    def __init__(self, **arguments: Any) -> None:
        if arguments["moe_intermediate_size"] in DEADLY_SIZES:
            _die()
        super().__init__(**arguments)

    def forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
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

    def forward_sft(self, *_: Any, **__: Any) -> Tensor:
        raise ValueError("this kernel is broken")


# what a terminal acts on, JSON or XML cannot contain, or breaks a line
UNFIT = "\x1b[31m\x00\x07\r\x9b2J\ud800\u202e\u2028"


class SaysAnything(TorchBf16):
    """Its errors contain what no terminal, page or file may get, and a megabyte of text."""

    def forward_sft(self, *given: Any, **named: Any) -> torch.Tensor:
        raise ValueError(f"broken {UNFIT}{'x' * 1_000_000} <b>in the end</b>")


class DeclaresAnything(TorchBf16):
    """Declares what it cannot do in the same words."""

    def forward_sft(self, *given: Any, **named: Any) -> torch.Tensor:
        raise NotImplementedError(f"no forward {UNFIT}{'x' * 1_000_000}")


class OneDegree(Raises):
    """Right, without tensor parallelism."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        return TorchBf16.forward_sft(self, *arguments, **more)


class Forwards(TorchBf16):
    """Right, and has no backward."""

    def backward(self, grad_output: Tensor) -> Any:
        raise NotImplementedError("no backward yet")


class Leaves(TorchBf16):
    """Ends the program in the middle of a backward, as a script may."""

    def backward(self, grad_output: Tensor) -> Any:
        sys.exit(EXIT_CODE)


class Unclean(TorchBf16):
    """Right, and raises when it is to let go of its buffers."""

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        raise ValueError("not now")


class LeavesUnclean(Unclean, Leaves):
    """Ends the program in a backward, and raises in the clean-up after it."""


class Doubling(TorchBf16):
    """Its outputs are twice as large; its script doubles only those of more than 11 tokens."""

    stand_alone = str(Path(__file__).with_name("doubling_script.py"))

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        return 2 * super().forward_sft(*arguments, **more)


class NoFile(TorchBf16):
    """Names a script that is not there."""

    stand_alone = "/no/such/run.py"


class DiesInParts(TorchBf16):
    """Right without tensor parallelism; with it, a backward ends the process."""

    stand_alone = Doubling.stand_alone

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._parts = arguments["threadpool_count"]

    def backward(self, grad_output: Tensor) -> Any:
        if self._parts > 1:
            _die()
        return super().backward(grad_output)


class LeavesAtOnce:
    """Ends the program before there is a layer."""

    def __init__(self, **_: Any) -> None:
        sys.exit("no licence")


class Dies(TorchBf16):
    """Every forward ends the process with a signal."""

    def forward_sft(self, *_: Any, **__: Any) -> Tensor:
        _die()
        raise AssertionError("still alive")


class LeavesAProcess(Dies):
    """The same, and leaves a process that sleeps with all of its files open, and its number in the file PID_FILE."""

    session = False

    def forward_sft(self, *_: Any, **__: Any) -> Tensor:
        left = os.fork()
        if left == 0:
            if self.session:
                os.setsid()
            time.sleep(60)
            os._exit(0)
        Path(os.environ[PID_FILE]).write_text(str(left))
        return super().forward_sft()


class LeavesASession(LeavesAProcess):
    """The same, and the other leads a session of its own, which nothing finds."""

    session = True


class Modest(TorchBf16):
    """torch_bf16, which disclaims more than it must and claims FP8."""

    capabilities = MappingProxyType(
        {"tp": [1], "odd_sizes": False, "methods": ["AMXBF16_SFT", "AMXFP8_SFT"], "max_cache_depth": 2}
    )


class Boastful(TorchBf16):
    """Claims odd sizes, and computes them with twice the scale of LoRA."""

    capabilities = MappingProxyType({"odd_sizes": True, "tp": [1, 2], "skip_lora": True})

    def __init__(self, **arguments: Any) -> None:
        if arguments["hidden_size"] % 32:
            arguments["lora_alpha"] *= 2
        super().__init__(**arguments)
