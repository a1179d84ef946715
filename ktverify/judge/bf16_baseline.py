"""How far the plain bf16 program is from the oracle: the measure for what an engine may err.

Comes in: the inputs of a case and the oracle's tensors. Goes out: rel_l2 by tensor. Knows no engine and no budget;
how many neighbours of a small case are asked stands in tolerances.toml, for it moves the budgets.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch

from ktverify.judge.gates import tolerances
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward, peer_bf16
from ktverify.spec.inputs import Inputs


def peer_error(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """rel_l2 of reference.peer_bf16 against `expected` (what forward_backward gave for `inputs`), by tensor name."""
    squares = {name: [compare(tensor, expected[name]).rel_l2 ** 2] for name, tensor in peer_bf16(inputs).items()}
    case, numbers = inputs.case, tolerances()["peer"]
    weights = 3 * len(inputs.active) * case.hidden * case.intermediate
    few = 0 < case.qlen * case.top_k < numbers["neighbour_slots"] and weights <= numbers["neighbour_weights"]
    if few and not case.exact:
        for number in range(numbers["neighbours"]):
            near = _neighbour(inputs, number)
            right = forward_backward(near)
            for name, tensor in peer_bf16(near).items():
                squares[name].append(compare(tensor, right[name]).rel_l2 ** 2)
    return {name: math.sqrt(sum(found) / len(found)) for name, found in squares.items()}


def _neighbour(inputs: Inputs, number: int) -> Inputs:
    """The same inputs, but for the last bit of half of the elements of hidden_states and grad_output."""
    return replace(
        inputs,
        hidden_states=_flip(inputs.hidden_states, f"x {number}"),
        grad_output=_flip(inputs.grad_output, f"dO {number}"),
    )


def _flip(tensor: torch.Tensor, seed: str) -> torch.Tensor:
    """[T, H] bf16 with the last bit of half of the elements flipped; 0, NaN and Inf stay."""
    bits = tensor.contiguous().view(torch.int16)
    count = bits.numel()
    # a stream of hash bytes: which elements are flipped must not depend on the machine
    stream = hashlib.shake_256(f"ktverify neighbour {seed}".encode()).digest(max(1, count))
    coin = torch.frombuffer(bytearray(stream), dtype=torch.uint8)[:count].reshape(bits.shape).to(torch.int16) & 1
    alive = torch.isfinite(tensor) & (tensor != 0)
    return (bits ^ torch.where(alive, coin, 0).to(torch.int16)).view(torch.bfloat16)
