"""Base weights that the caller has dropped are packed piece by piece in their place; those that somebody holds stay."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktverify.cases import Case
from ktverify.experts import KTMoEWrapper
from ktverify.running import layer_arguments
from suites.support.child import resident_of
from suites.support.subject import expect

CASE = Case.parse("E=16,k=1,H=1024,I=1024,T=16,r=1,alpha=1")


def _layer() -> KTMoEWrapper:
    layer = KTMoEWrapper(**layer_arguments(CASE, threads=2))
    layer.init_lora_weights(*(torch.zeros(shape, dtype=torch.bfloat16) for shape in layer.spec.lora_shapes.values()))
    return layer


def _weights(layer: KTMoEWrapper) -> list[Tensor]:
    shapes = layer.spec.expert_shapes.values()
    return [torch.full((CASE.num_experts, *shape), 0.5, dtype=torch.bfloat16) for shape in shapes]


def _load(layer: KTMoEWrapper, weights: list[Tensor]) -> None:
    gate_proj, up_proj, down_proj = weights
    layer.load_weights_from_tensors(gate_proj, up_proj, down_proj, torch.arange(CASE.num_experts))


def _reach(layer: KTMoEWrapper, tokens: int) -> None:
    """Token t goes to expert t."""
    x = torch.full((tokens, CASE.hidden), 0.5, dtype=torch.bfloat16)
    layer.forward_sft(x, torch.arange(tokens)[:, None], torch.ones(tokens, 1), save_for_backward=False)
    expect(layer.packed_experts == tokens, f"{layer.packed_experts} experts are packed after {tokens}")


def check_never_twice() -> None:
    """Whatever part of the experts has been reached, the process held the weights and one expert at most."""
    layer = _layer()
    before = resident_of(os.getpid())
    weights = _weights(layer)
    size = sum(tensor.nbytes for tensor in weights)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    _load(layer, weights)
    del weights
    for tokens in (1, 8, 15, 16):
        _reach(layer, tokens)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 - before
    # one expert, huge pages that are not full, and what a call works with
    budget = 1.05 * size + size / CASE.num_experts + (4 << 20)
    expect(peak < budget, f"{peak / size:.2f} times the weights at the peak", "resources")


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda tensor: tensor,
    "a view": lambda tensor: tensor[3:],
    "a storage": lambda tensor: tensor.untyped_storage(),
    "an array": lambda tensor: tensor.view(torch.int16).numpy(),
}


def check_held_ones_stay() -> None:
    """A tensor, a view, a storage or an array that somebody holds keeps its values while experts are packed."""
    for what, hold in HOLDERS.items():
        layer = _layer()
        weights = _weights(layer)
        _load(layer, weights)
        held = [hold(tensor) for tensor in weights]
        del weights
        _reach(layer, 15)
        for one in held:
            seen = torch.empty(0, dtype=torch.bfloat16).set_(one) if what == "a storage" else one
            seen = torch.from_numpy(one).view(torch.bfloat16) if what == "an array" else seen
            expect(bool((seen == 0.5).all()), f"{what} was held, and its values are gone")


def check_lent_memory_stays() -> None:
    """What numpy lent to torch is not given up when the last tensor is dropped: numpy still has it."""
    layer = _layer()
    arrays = [tensor.view(torch.int16).numpy().copy() for tensor in _weights(layer)]
    _load(layer, [torch.from_numpy(array).view(torch.bfloat16) for array in arrays])
    _reach(layer, 15)
    expect(all(bool(np.all(array == 0x3F00)) for array in arrays), "the memory of an array was given up")
