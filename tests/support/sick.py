"""Engines that are ill in one or two known ways: what `diagnose` and `debug` have to name."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.target import Target
from ktverify.engines.run import run_layer
from ktverify.mutants.base import Plain
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import LORA_NAMES

LINES = Path(__file__).read_text(encoding="utf-8").splitlines()
CASE = Case.parse("E=4,k=2,H=32,I=32,T=5,r=4,alpha=8")


def calls(target: Target) -> None:
    """One forward, backward and update of a layer."""
    inputs = make_inputs(CASE)
    layer = target.layer(CASE, inputs)
    run_layer(layer, inputs)
    layer.update_lora_weights()


class StaleLora(Plain):
    """update_lora_weights leaves the tensors `stale` as they were first."""

    stale: tuple[str, ...] = ()

    def update_lora_weights(self) -> None:
        before = dict(self._lora)
        super().update_lora_weights()
        self._lora.update({name: before[name] for name in self.stale})


STALE = {name: type(f"Stale_{name}", (StaleLora,), {"stale": (name,), "__module__": __name__}) for name in LORA_NAMES}
globals().update({kind.__name__: kind for kind in STALE.values()})


class SegfaultInForward(Plain):
    """Every forward reads address 0."""

    def forward_sft(self, *_: Any, **__: Any) -> Tensor:
        print("about to read", flush=True)
        return self._inner()

    def _inner(self) -> Tensor:
        ctypes.string_at(0)
        raise AssertionError("still alive")


class HangInBackward(Plain):
    """No backward ever ends."""

    def backward(self, grad_output: Tensor) -> Any:
        print("going to sleep", flush=True)
        self._wait()

    def _wait(self) -> None:
        while True:
            time.sleep(1)


class EatsInBackward(Plain):
    """Every backward takes memory without an end."""

    def backward(self, grad_output: Tensor) -> Any:
        kept = []
        while True:
            kept.append(torch.ones(1 << 24))


class ExitsInForward(Plain):
    """Every forward ends the process without an exception."""

    def forward_sft(self, *_: Any, **__: Any) -> Tensor:
        os._exit(3)


class LeavesInBackward(Plain):
    """Every backward calls sys.exit."""

    def backward(self, grad_output: Tensor) -> Any:
        sys.exit(3)  # LeavesInBackward raises here


class NoBackward(Plain):
    """Declares that it has no backward."""

    def backward(self, grad_output: Tensor) -> Any:
        raise NotImplementedError("no backward yet")


class NoLayer(Plain):
    """Declares that it can do nothing."""

    def __init__(self, **_: Any) -> None:
        raise NotImplementedError("not on this machine")


class RaisesInConstructor(Plain):
    """Its constructor divides by zero."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.part = 1 // (self.spec.lora_rank - self.spec.lora_rank)  # RaisesInConstructor raises here


class RaisesInTorch(Plain):
    """Its forward hands torch two shapes that do not fit."""

    def forward_sft(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.nn.functional.linear(hidden_states, torch.ones(3, 3))  # RaisesInTorch raises here


class RaisesDeepInside(Plain):
    """Its backward asks a list of torch's for what it does not have."""

    def backward(self, grad_output: Tensor) -> Any:
        return self._first(list(torch.ones(0)))

    def _first(self, values: list[Tensor]) -> Tensor:
        return values[0]  # RaisesDeepInside raises here


class RaisesInUpdate(Plain):
    """It cannot update, which nothing else calls."""

    def update_lora_weights(self) -> None:
        raise ValueError("no update")  # RaisesInUpdate raises here


class SegfaultInUpdate(Plain):
    """update_lora_weights reads address 0."""

    def update_lora_weights(self) -> None:
        ctypes.string_at(0)


def RaisesInFactory(**arguments: Any) -> Plain:
    """A factory that wants an argument that there is not."""
    return Plain(layer_idx=arguments["no_such_size"])  # RaisesInFactory raises here
