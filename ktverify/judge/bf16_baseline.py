"""The error of plain torch in bf16 against the oracle, of which every budget is a multiple.

The number of perturbed copies of a small case is set in tolerances.toml because it affects the budgets.
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
    """rel_l2 of reference.peer_bf16 by tensor; expected: forward_backward of `inputs`.

    For a case with few token slots, the root mean square over the case and its perturbed copies.
    """
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
    """A copy of the inputs with another last bit in half of the elements of hidden_states and grad_output."""
    return replace(
        inputs,
        hidden_states=_flip(inputs.hidden_states, f"x {number}"),
        grad_output=_flip(inputs.grad_output, f"dO {number}"),
    )


def _flip(tensor: torch.Tensor, seed: str) -> torch.Tensor:
    """[T, H] bf16 with the last bit of half of the elements flipped; 0, NaN and Inf stay."""
    bits = tensor.contiguous().view(torch.int16)
    count = bits.numel()
    # bytes of a hash, so that the flipped elements do not depend on the machine
    stream = hashlib.shake_256(f"ktverify neighbour {seed}".encode()).digest(max(1, count))
    coin = torch.frombuffer(bytearray(stream), dtype=torch.uint8)[:count].reshape(bits.shape).to(torch.int16) & 1
    alive = torch.isfinite(tensor) & (tensor != 0)
    return (bits ^ torch.where(alive, coin, 0).to(torch.int16)).view(torch.bfloat16)
