"""Calls of a layer as the probes need them: copies of results, bits compared, inputs in odd places, bad arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktverify.diagnose.evidence import Tensors
from ktverify.engines.registry import EngineFactory
from ktverify.engines.run import layer_arguments, run_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_INPUT, GRAD_WEIGHTS, OUTPUT

_INPUTS = ("hidden_states", "expert_ids", "weights", "grad_output", "gate_proj", "up_proj", "down_proj")


def run(layer: Any, inputs: Inputs, *, copy: bool = True) -> dict[str, Tensor]:
    """ALL_TENSORS of one forward and backward of a loaded layer."""
    found = run_layer(layer, inputs)
    return {name: tensor.detach().clone() if copy else tensor for name, tensor in found.items()}


def backward(layer: Any, inputs: Inputs, output: Tensor) -> dict[str, Tensor]:
    """ALL_TENSORS, the output as given, of the newest saved forward."""
    grad_input, gradients = layer.backward(inputs.grad_output)
    return {OUTPUT: output, GRAD_INPUT: grad_input, **gradients, GRAD_WEIGHTS: layer.grad_weights}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal byte for byte, so that NaN equals NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)))


def unequal(left: Tensors, right: Tensors, names: tuple[str, ...] = ALL_TENSORS) -> list[str]:
    """The tensors whose bits differ."""
    return [name for name in names if not same_bits(left[name], right[name])]


def where(left: Tensors, right: Tensors) -> str:
    """`output differs in 3 of 96 elements, first [0, 5]`, of the first tensor that does, and how many more do."""
    names = unequal(left, right)
    if not names:
        return "nothing"
    a, b = left[names[0]], right[names[0]]
    more = f", and {len(names) - 1} more tensors" if len(names) > 1 else ""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{names[0]} is {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}{more}"
    places = ((a != b) & ~(a.isnan() & b.isnan())).nonzero()
    first = places[0].tolist() if len(places) else []
    return f"{names[0]} differs in {len(places)} of {a.numel()} elements, first {first}{more}"


def everywhere(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """`inputs` with every tensor that a layer takes put through `change`."""
    lora = {name: change(tensor) for name, tensor in inputs.lora.items()}
    tensors: dict[str, Any] = {name: change(getattr(inputs, name)) for name in _INPUTS}
    return replace(inputs, lora=lora, **tensors)


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(the same values, the bytes of the buffer in which they lie between two margins)."""
    size, margin = tensor.numel() * tensor.element_size(), 4096
    buffer = torch.full((size + 2 * margin,), 0xA5, dtype=torch.uint8)
    return buffer[margin : margin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor), buffer


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def shifted(tensor: Tensor) -> Tensor:
    """The same values, one byte behind a multiple of 64."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.empty(size + 128, dtype=torch.uint8).numpy()
    start = -buffer.ctypes.data % 64 + 1
    copied = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copied.view(tensor.shape).copy_(tensor)


def refusal(act: Callable[[], object]) -> str | None:
    """What a call raised, in one line; None where it was accepted."""
    try:
        act()
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def bad_calls(
    case: Case, inputs: Inputs, loaded: Callable[..., Any], factory: EngineFactory
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is, the call) of arguments that must be refused."""
    wrong = {
        "k > E": {"num_experts_per_tok": case.num_experts + 1},
        "rank 0": {"lora_rank": 0},
        "alpha 0": {"lora_alpha": 0.0},
        "chunked_prefill_size 0": {"chunked_prefill_size": 0},
        "an unknown method": {"method": "NO_SUCH_METHOD"},
        "an unknown mode": {"mode": "no_such_mode"},
        "dropout 1": {"lora_dropout": 1.0},
        "TP that does not divide I": {"threadpool_count": min(n for n in range(2, 99) if case.intermediate % n)},
    }
    for text, more in wrong.items():
        yield text, lambda more=more: factory(**{**layer_arguments(case, threads=2), **more})  # type: ignore[misc]
    x, ids, w = inputs.hidden_states, inputs.expert_ids, inputs.weights
    if not len(x):
        return
    yield "a forward before the weights", lambda: factory(**layer_arguments(case)).forward_sft(x, ids, w)
    yield "fp32 hidden_states", lambda: loaded().forward_sft(x.float(), ids, w)
    yield "hidden_states of another width", lambda: loaded().forward_sft(x[:, :-1].contiguous(), ids, w)
    yield "int32 expert_ids", lambda: loaded().forward_sft(x, ids.int(), w)
    yield "bf16 weights", lambda: loaded().forward_sft(x, ids, w.bfloat16())
    yield "more tokens than chunked_prefill_size", lambda: loaded(chunked_prefill_size=1).forward_sft(x, ids, w)
    yield "a backward without a forward", lambda: loaded().backward(inputs.grad_output)
    yield "a backward with other rows", lambda: _forward(loaded(), inputs).backward(inputs.grad_output[:-1])
    yield "two forwards outstanding at depth 1", lambda: _forward(_forward(loaded(), inputs), inputs)
    broken = replace(inputs, physical_map=torch.zeros_like(inputs.physical_map))
    if case.num_experts > 1:
        yield "a physical_map that is no permutation", lambda: loaded(broken)
    short = replace(inputs, lora={name: tensor[:, :-1] for name, tensor in inputs.lora.items()})
    yield "LoRA of another rank", lambda: loaded(short)


def _forward(layer: Any, inputs: Inputs) -> Any:
    layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=True)
    return layer
