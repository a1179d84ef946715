"""The native engine's memory: what the caller drops is given back or used again; sentinels around results."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ktverify.checks.check import Function, Where, check
from ktverify.checks.target import ODD, Target, expect
from ktverify.engines.run import layer_arguments, run_layer
from ktverify.isolation.process import resident_of
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs

if TYPE_CHECKING:
    from ktverify.engines.native.layer import KTMoEWrapper

CASE = Case.parse("E=16,k=1,H=1024,I=1024,T=16,r=1,alpha=1")

# sentences of docs/contract.md
DROPPED = (
    "Base weights that the caller dropped give their memory back expert by expert, as they are packed; what the caller "
    "still refers to keeps its values."
)
REUSED = "The memory of dropped LoRA gradients is used again once all six are dropped."


def _memory(contract: str) -> Callable[[Function], Function]:
    return check(
        "dropped",
        contract,
        gates=("resources",),
        where=Where.BEST_ISA,
        fresh_process=True,
        native=True,
        internal=True,
    )


def _layer() -> KTMoEWrapper:
    # importing it loads the compiled engine, which must not happen before a process is forked
    from ktverify.engines.native.layer import KTMoEWrapper

    layer = KTMoEWrapper(**layer_arguments(CASE, threads=2))
    layer.init_lora_weights(*(torch.zeros(shape, dtype=torch.bfloat16) for shape in layer.spec.lora_shapes.values()))
    return layer


def _weights(layer: KTMoEWrapper) -> list[Tensor]:
    """Of expert e all elements are 1 + e / 128, so that one in another's place shows."""
    values = (1 + torch.arange(CASE.num_experts) / 128).to(torch.bfloat16)[:, None, None]
    return [values.expand(-1, *shape).contiguous() for shape in layer.spec.expert_shapes.values()]


def _call() -> tuple[Tensor, Tensor, Tensor]:
    """Token t goes to expert t, of all."""
    x = torch.full((CASE.num_experts, CASE.hidden), 2.0**-12, dtype=torch.bfloat16)
    return x, torch.arange(CASE.num_experts)[:, None], torch.ones(CASE.num_experts, 1)


def _load(layer: KTMoEWrapper, weights: list[Tensor]) -> None:
    gate_proj, up_proj, down_proj = weights
    layer.load_weights_from_tensors(gate_proj, up_proj, down_proj, torch.arange(CASE.num_experts))


def _reach(layer: KTMoEWrapper, tokens: int) -> Tensor:
    """The output for tokens of which token t goes to expert t."""
    x = torch.full((tokens, CASE.hidden), 2.0**-12, dtype=torch.bfloat16)
    output = layer.forward_sft(x, torch.arange(tokens)[:, None], torch.ones(tokens, 1), save_for_backward=False)
    expect(layer.packed_experts == tokens, f"{layer.packed_experts} experts are packed after {tokens}")
    return output


def _expected(weights: list[Tensor] | None = None) -> Tensor:
    """Of all experts, by a layer whose caller keeps the tensors."""
    layer = _layer()
    kept = weights if weights is not None else _weights(layer)
    _load(layer, kept)
    return _reach(layer, CASE.num_experts)


@_memory(DROPPED)
def check_never_twice(_target: Target) -> None:
    """Whatever part of the experts has been reached, the process held the weights and one expert at most."""
    expected = _expected()
    layer = _layer()
    layer.clear_sft_buffer_cache()
    before = resident_of(os.getpid())
    weights = _weights(layer)
    size = sum(tensor.nbytes for tensor in weights)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    _load(layer, weights)
    del weights
    for tokens in (1, 8, 15, 16):
        found = _reach(layer, tokens)
        expect(torch.equal(found, expected[:tokens]), f"wrong results once {tokens} experts are packed")
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


@_memory(DROPPED)
def check_held_ones_stay(_target: Target) -> None:
    """Tensors, views, storages and arrays that the caller refers to keep their values while experts are packed."""
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
            expect(bool((seen >= 1).all()), f"{what} was held, and its values are gone")


@_memory(DROPPED)
def check_lent_memory_stays(_target: Target) -> None:
    """What numpy lent to torch is not given up when the last tensor is dropped: numpy still has it."""
    layer = _layer()
    arrays = [tensor.view(torch.int16).numpy().copy() for tensor in _weights(layer)]
    _load(layer, [torch.from_numpy(array).view(torch.bfloat16) for array in arrays])
    _reach(layer, 15)
    expect(all(bool(np.all(array >= 0x3F80)) for array in arrays), "the memory of an array was given up")


@_memory(DROPPED)
def check_experts_that_share_memory_stay(_target: Target) -> None:
    """One matrix for all experts, or experts that overlap, are not given up with the first of them."""
    spread = [weight[3:4].clone() for weight in _weights(_layer())]
    expected = _expected([weight.expand(CASE.num_experts, -1, -1) for weight in spread])
    layer = _layer()
    _load(layer, [weight.expand(CASE.num_experts, -1, -1) for weight in spread])
    del spread
    for tokens in (1, 8, 16):
        expect(torch.equal(_reach(layer, tokens), expected[:tokens]), "a shared matrix was given up")


@_memory(DROPPED)
def check_threads_reach_it_at_once(_target: Target) -> None:
    """Two threads whose forwards are the first, on one layer: both are right."""
    expected = _expected()
    for _ in range(8):
        layer = _layer()
        _load(layer, _weights(layer))
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(layer.forward_sft, *_call(), save_for_backward=False) for _ in range(2)]
            for found in (call.result() for call in calls):
                expect(torch.equal(found, expected), "wrong results of one of two threads")


# ---- LoRA gradients


def _gradients(layer: KTMoEWrapper) -> dict[str, Tensor]:
    x, ids, weights = _call()
    layer.forward_sft(x, ids, weights)
    return layer.backward(torch.ones_like(x))[1]


@_memory(REUSED)
def check_gradient_memory_comes_back(_target: Target) -> None:
    """The memory of gradients is handed out again when all of them are dropped, not before, and can be returned."""
    layer = _layer()
    _load(layer, _weights(layer))
    first = _gradients(layer)
    expected = {name: tensor.clone() for name, tensor in first.items()}
    place, held = min(tensor.data_ptr() for tensor in first.values()), first["grad_up_lora_a"][1:]
    del first
    second = _gradients(layer)
    other = min(tensor.data_ptr() for tensor in second.values())
    expect(other != place, "a view of a gradient is held, and its memory was handed out")
    expect(torch.equal(held, expected["grad_up_lora_a"][1:]), "a gradient that is held has changed")
    del second
    third = _gradients(layer)
    expect(min(tensor.data_ptr() for tensor in third.values()) == other, "dropped memory was not handed out again")
    for name, tensor in third.items():
        expect(torch.equal(tensor, expected[name]), f"{name} differs in memory that was used before")
    del third, held, tensor
    before = resident_of(os.getpid())
    layer.clear_sft_buffer_cache()
    gone, size = before - resident_of(os.getpid()), sum(tensor.nbytes for tensor in expected.values())
    expect(gone >= 2 * size, f"{gone} bytes were returned, two sets of gradients have {2 * size}", "resources")


# ---- sentinels around what the engine writes: a byte too far in either direction shows

GUARD = 4096  # bytes on either side, beyond any vector, tile or panel row
PATTERN = 0xA5
# remainders of every block, more rows than a group, parts of their own
GUARDED = (ODD, Case.parse("E=4,k=2,H=130,I=92,T=37,r=5,alpha=8,lora=float32"), Case.parse("E=2,k=1,H=1,I=4,T=1,r=1"))


class Guards:
    """Memory with a pattern around each tensor that was asked for."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Stands in for torch.empty: the pattern inside as well, so that what is not written shows."""
        size = math.prod(shape) * dtype.itemsize
        block = torch.full((GUARD + size + GUARD,), PATTERN, dtype=torch.uint8, device=device)
        self.blocks.append(block)
        return block[GUARD : GUARD + size].view(dtype).view(tuple(shape))

    def gradients(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, *, written: int) -> Any:
        """Stands in for the memory of dropped LoRA gradients, which is not zero."""
        return [self.empty(shape, dtype=dtype) for shape in shapes], False

    def broken(self) -> list[int]:
        """The number of each block whose pattern has changed."""
        around = [torch.cat((block[:GUARD], block[-GUARD:])) for block in self.blocks]
        return [number for number, guard in enumerate(around) if bool((guard != PATTERN).any())]


@check("native", "Results are written to their last byte, and nothing beside them.", native=True, internal=True)
def check_sentinels(target: Target) -> None:
    """AssertionError unless forward and backward write every byte of their results and none beside them."""
    # importing it loads the compiled engine, which must not happen before a process is forked
    from ktverify.engines.native import layer as native_layer

    for case in GUARDED:
        inputs = make_inputs(case)
        for tp in (1, 4) if case.intermediate % 4 == 0 else (1,):
            expected = run_layer(target.layer(case, inputs, tp=tp), inputs)
            layer: Any = target.layer(case, inputs, tp=tp)
            guards = Guards()
            with (
                mock.patch.object(torch, "empty", guards.empty),
                mock.patch.object(native_layer, "gradient_tensors", guards.gradients),
            ):
                found = run_layer(layer, inputs)
            expect(len(guards.blocks) >= len(found), f"{len(guards.blocks)} guarded results of {len(found)}")
            expect(not guards.broken(), f"{case.id}, TP {tp}: written beside results {guards.broken()}")
            target.expect_same_bits(f"{case.id}, TP {tp}: with sentinels and without", expected, found)
            # the sentinels do see a byte too far
            guards.blocks[-1][GUARD - 1] ^= 1
            expect(guards.broken() == [len(guards.blocks) - 1], "a byte before a result was changed, and not seen")
