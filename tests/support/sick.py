"""Engines that are ill in one or two known ways: what `diagnose` and `debug` have to name."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ktverify.checks.target import Target
from ktverify.engines.run import run_layer
from ktverify.mutants import lora, numbers, routes, weights
from ktverify.mutants.base import Gradients, Group, Plain
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


class SegfaultInConstructor(Plain):
    """Its constructor reads address 0."""

    def __init__(self, **_: Any) -> None:
        ctypes.string_at(0)


class PrintsAndDies(Plain):
    """Its backward prints megabytes in few lines, then a short one, and reads address 0."""

    def backward(self, grad_output: Tensor) -> Any:
        for _ in range(40):
            os.write(2, b"x" * (1 << 16) + b"\n")
        print("the last that it said", file=sys.stderr, flush=True)
        ctypes.string_at(0)


class InterruptsItself(Plain):
    """Its backward raises what is no Exception."""

    def backward(self, grad_output: Tensor) -> Any:
        raise KeyboardInterrupt  # InterruptsItself raises here


class OtherNames(Plain):
    """Its gradients have names of its own."""

    def backward(self, grad_output: Tensor) -> Any:
        grad_input, gradients = super().backward(grad_output)
        return grad_input, {f"d_{name}": tensor for name, tensor in gradients.items()}


class ReturnsAnArray(Plain):
    """Its forward returns numbers that are no tensor."""

    def forward_sft(self, *given: Any, **named: Any) -> Any:
        return super().forward_sft(*given, **named).float().numpy()


class ResultOnMeta(Plain):
    """Its output has no values."""

    def forward_sft(self, *given: Any, **named: Any) -> Tensor:
        return super().forward_sft(*given, **named).to("meta")


class SparseResult(Plain):
    """Its grad_input is a sparse tensor."""

    def backward(self, grad_output: Tensor) -> Any:
        grad_input, gradients = super().backward(grad_output)
        return grad_input.to_sparse(), gradients


class HangInUpdate(Plain):
    """No update ever ends."""

    def update_lora_weights(self) -> None:
        while True:
            time.sleep(1)


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


# ---- stale values


class UpdateDoesNothing(StaleLora):
    """update_lora_weights changes nothing."""

    stale = LORA_NAMES


class StaleBase(Plain):
    """A second load_weights_from_tensors changes nothing."""

    def load_weights_from_tensors(self, *tensors: Tensor) -> None:
        if not self._base:
            super().load_weights_from_tensors(*tensors)


class StaleDown(Plain):
    """A second load_weights_from_tensors does not change down_proj."""

    def load_weights_from_tensors(self, *tensors: Tensor) -> None:
        before = self._base
        super().load_weights_from_tensors(*tensors)
        self._base = (*self._base[:2], *(before or self._base)[2:])


class PackedOnce(Plain):
    """gate_lora_b is packed at the first call, and never again."""

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        self._packed = getattr(self, "_packed", None) or {}
        packed = self._packed.setdefault(expert, super().lora_of(expert)["gate_lora_b"].clone())
        return {**super().lora_of(expert), "gate_lora_b": packed}


class StaleInBackward(Plain):
    """The backward uses the gate_lora_b of before every update."""

    def init_lora_weights(self, *tensors: Tensor) -> None:
        super().init_lora_weights(*tensors)
        self._first = self._lora["gate_lora_b"].clone()

    def gate_up_gradients(self, at: Group, dg: Tensor, du: Tensor) -> tuple[Tensor, Gradients]:
        at.lora = {**at.lora, "gate_lora_b": self._first[at.expert].float()}
        return super().gate_up_gradients(at, dg, du)


class StaleFp32(StaleLora):
    """gate_lora_b stays what it was, where LoRA is fp32."""

    def update_lora_weights(self) -> None:
        self.stale = ("gate_lora_b",) if self._lora["gate_lora_b"].dtype is torch.float32 else ()
        super().update_lora_weights()


class OfTheFirstLayer(Plain):
    """All layers of a process compute with the down_proj of the first one of their size."""

    _kept: ClassVar[dict[torch.Size, Tensor]] = {}

    def load_weights_from_tensors(self, *tensors: Tensor) -> None:
        super().load_weights_from_tensors(*tensors)
        down = self._base[2]
        self._base = (*self._base[:2], self._kept.setdefault(down.shape, down.clone()))


# ---- two defects at once


def both(*kinds: type[Plain]) -> type[Plain]:
    """An engine with the defects of several mutants."""
    return type("_and_".join(kind.__name__ for kind in kinds), kinds, {"__module__": __name__, "__doc__": "Several."})


PAIRS = (
    both(lora.lora_b_gradient_unscaled, routes.routing_gradient_zero),
    both(numbers.slope_is_sigma, routes.routing_gradient_weighted),
    both(lora.no_lora_on_down, numbers.slope_is_sigma),
    both(weights.gate_up_lora_a_exchanged, numbers.slope_is_sigma),
    both(lora.lora_scale_one, routes.no_routing_weight_in_backward),
    both(weights.down_b_gradient_transposed, weights.gate_up_gradients_exchanged, lora.grad_input_without_lora),
    both(weights.experts_0_and_1_exchanged, routes.routing_gradient_zero),
    both(STALE["gate_lora_b"], routes.routing_gradient_zero),
    both(STALE["gate_lora_b"], StaleDown),
    both(routes.routing_gradient_zero, HangInBackward),
    both(lora.lora_scale_one, StaleDown),
)
globals().update({kind.__name__: kind for kind in PAIRS})


class ScaledOnce(Plain):
    """LoRA is scaled by 1, not by alpha / rank, in the first call of each process."""

    _calls: ClassVar[list[int]] = []

    def scale(self) -> float:
        self._calls.append(1)
        return 1.0 if len(self._calls) == 1 else super().scale()
