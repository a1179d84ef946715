"""Right engines that write into what was given to them, or change their process: the judge names the first, and nothing
of the others may reach a verdict."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktverify.engines.torch_bf16 import TorchBf16
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

# arguments by the call after which an engine writes into them
WRITTEN = {
    **dict.fromkeys(("hidden_states", "expert_ids", "weights", *BASE_NAMES, *LORA_NAMES), "forward_sft"),
    "grad_output": "backward",
}


class Writes(TorchBf16):
    """Right; changes the last element of the argument `into` once its results are there."""

    into = ""

    def load_weights_from_tensors(self, *given: Tensor) -> None:
        super().load_weights_from_tensors(*given)
        self.had = dict(zip(BASE_NAMES, given, strict=False))

    def init_lora_weights(self, *given: Tensor) -> None:
        super().init_lora_weights(*given)
        self.had |= dict(zip(LORA_NAMES, given, strict=True))

    def forward_sft(self, *given: Any, **more: Any) -> Tensor:
        output = super().forward_sft(*given, **more)
        self._write(self.had | dict(zip(("hidden_states", "expert_ids", "weights"), given, strict=False)))
        return output

    def backward(self, grad_output: Tensor) -> Any:
        found = super().backward(grad_output)
        self._write({"grad_output": grad_output})
        return found

    def _write(self, arguments: dict[str, Tensor]) -> None:
        if self.into in arguments:
            arguments[self.into].detach().flatten()[-1] += 1


# ---- what changes their process


class MovesItsFiles(TorchBf16):
    """Right; moves and links files of its own between folders, as compilers do with what they cache."""

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            Path(one, "kernel").write_text("code")
            os.link(Path(one, "kernel"), Path(other, "linked"))
            os.replace(Path(one, "kernel"), Path(other, "moved"))
            assert Path(other, "linked").read_text() == Path(other, "moved").read_text() == "code"
        return super().forward_sft(*arguments, **more)


def _gone() -> None:
    folder = Path(f"/tmp/ktverify-gone-{os.getpid()}")
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()


def _poisoned() -> None:
    sys.modules["torch.nn.functional"] = sys.modules["math"] = None  # type: ignore[assignment]


SOILS: dict[str, Callable[[], Any]] = {
    "default device": lambda: torch.set_default_device("meta"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "threads": lambda: torch.set_num_threads(7),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "warnings": lambda: warnings.simplefilter("error"),
    "environment": lambda: os.environ.clear(),
    "directory": _gone,
    "signals": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "rounding": lambda: ctypes.CDLL("libm.so.6").fesetround(0x400),
    "errstate": lambda: __import__("numpy").seterr(all="raise"),
    "umask": lambda: os.umask(0o777),
    "stdout": lambda: os.close(1),
    "modules": _poisoned,
}


class Soiled(TorchBf16):
    """Right; after its first forward, `soil` has changed its process."""

    soil = ""
    done = False

    def forward_sft(self, *arguments: Any, **more: Any) -> Tensor:
        output = super().forward_sft(*arguments, **more)
        if not Soiled.done:
            Soiled.done = True
            SOILS[self.soil]()
        return output


def __getattr__(name: str) -> Any:
    """`soils_default_device` and so on: the engines that SOILS describes; `writes_hidden_states` those of WRITTEN."""
    if (into := name.removeprefix("writes_")) in WRITTEN:
        return functools.partial(type("WritesOne", (Writes,), {"into": into}))
    soil = name.removeprefix("soils_").replace("_", " ")
    if soil not in SOILS:
        raise AttributeError(name)
    return functools.partial(type("Soils", (Soiled,), {"soil": soil}))
