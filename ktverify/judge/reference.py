"""The oracle: docs/contract.md, "The layer", written by hand as a plain loop over experts;
and one expert as a torch user writes it.

Imports torch and, of this package, only names, so that no engine can share a mistake with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from ktverify.spec.names import GRAD_INPUT, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

# Dropout: what multiplies LoRA's input, 0 or 1 / (1 - p), by "gate" and "up" [T, k, H] and "down" [T, k, I]
Masks = Mapping[str, torch.Tensor]
# those of n token slots, for gate and up [n, H] and down [n, I]
OfRows = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Scaled(Protocol):
    """The oracle's view of a case: s = alpha / rank."""

    @property
    def scaling(self) -> float: ...


class LayerInputs(Protocol):
    """hidden_states, grad_output [T, H]; expert_ids [T, k] int64; weights [T, k]; gate_proj, up_proj [E, I, H];
    down_proj [E, H, I]; lora: six tensors by LORA_NAMES; all in logical order."""

    hidden_states: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    grad_output: torch.Tensor
    gate_proj: torch.Tensor
    up_proj: torch.Tensor
    down_proj: torch.Tensor
    lora: dict[str, torch.Tensor]

    @property
    def case(self) -> Scaled: ...


def forward_backward(
    inputs: LayerInputs,
    *,
    dtype: torch.dtype = torch.float64,
    skip_lora: bool = False,
    backward: bool = True,
    masks: Masks | None = None,
) -> dict[str, torch.Tensor]:
    """ALL_TENSORS of one forward and one backward, computed and returned in `dtype` (fp64 or fp32).

    output, grad_input [T, H]; six LoRA gradients in their parameters' shapes, zero for idle experts; grad_weights
    [T, k], zero for ids of -1. skip_lora leaves every LoRA term out of the backward (LoRA gradients zero); the forward
    has them all the same. backward=False gives only output. masks: those of dropout, by default none. One expert's
    weights are converted at a time.

    Formulas: docs/contract.md, "The layer". d silu(g) / dg = sigma(g) (1 + g (1 - sigma(g))).
    """
    s = inputs.case.scaling
    result = _empty_result(inputs, dtype, backward)
    output = result[OUTPUT]
    for expert, rows, slots in routed(inputs.expert_ids):
        x = inputs.hidden_states[rows].to(dtype)
        w = inputs.weights[rows, slots].to(dtype).unsqueeze(1)
        gate, up, down = (tensor[expert].to(dtype) for tensor in (inputs.gate_proj, inputs.up_proj, inputs.down_proj))
        ga, gb, ua, ub, da, db = (inputs.lora[name][expert].to(dtype) for name in LORA_NAMES)

        m_gate, m_up, m_down = (None if mask is None else mask.to(dtype) for mask in of_rows(masks, rows, slots))
        x_gate, x_up = dropped(x, m_gate), dropped(x, m_up)
        x_ga, x_ua = x_gate @ ga.T, x_up @ ua.T
        g = x @ gate.T + s * (x_ga @ gb.T)
        u = x @ up.T + s * (x_ua @ ub.T)
        sigma = torch.sigmoid(g)
        silu = g * sigma
        h = silu * u
        h_down = dropped(h, m_down)
        h_da = h_down @ da.T
        y = h @ down.T + s * (h_da @ db.T)
        output.index_add_(0, rows, w * y)
        if not backward:
            continue

        d_out = inputs.grad_output[rows].to(dtype)
        result[GRAD_WEIGHTS][rows, slots] = (d_out * y).sum(1)
        dy = w * d_out
        dh = dy @ down
        if not skip_lora:
            dy_db = dy @ db
            result["grad_down_lora_b"][expert] = s * (dy.T @ h_da)
            result["grad_down_lora_a"][expert] = s * (dy_db.T @ h_down)
            dh = dh + dropped(s * (dy_db @ da), m_down)
        dg = dh * u * (sigma * (1 + g * (1 - sigma)))
        du = dh * silu
        dx = dg @ gate + du @ up
        if not skip_lora:
            dg_gb, du_ub = dg @ gb, du @ ub
            result["grad_gate_lora_b"][expert] = s * (dg.T @ x_ga)
            result["grad_gate_lora_a"][expert] = s * (dg_gb.T @ x_gate)
            result["grad_up_lora_b"][expert] = s * (du.T @ x_ua)
            result["grad_up_lora_a"][expert] = s * (du_ub.T @ x_up)
            dx = dx + dropped(s * (dg_gb @ ga), m_gate) + dropped(s * (du_ub @ ua), m_up)
        result[GRAD_INPUT].index_add_(0, rows, dx)
    return result


def plain_expert(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_a: torch.Tensor,
    gate_b: torch.Tensor,
    up_a: torch.Tensor,
    up_b: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    *,
    scaling: float,
    skip_lora: bool = False,
    masks: OfRows = (None, None, None),
) -> torch.Tensor:
    """[n, H]: one expert's y of x [n, H] as a torch user writes it, in x's dtype; differentiable.

    gate, up [I, H], down [H, I] in x's dtype; LoRA [r, in], [out, r] in x's dtype or fp32, which then computes in fp32.
    skip_lora: no gradient flows through the LoRA terms. masks: what multiplies the LoRA inputs of gate, up and down.
    """

    def linear(
        value: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        base = functional.linear(value, weight)
        operand = dropped(value.to(a.dtype), None if mask is None else mask.to(a.dtype))
        low = functional.linear(functional.linear(operand, a), b) * scaling
        return (base + (low.detach() if skip_lora else low)).to(value.dtype)

    h = functional.silu(linear(x, gate, gate_a, gate_b, masks[0])) * linear(x, up, up_a, up_b, masks[1])
    return linear(h, down, down_a, down_b, masks[2])


def of_rows(masks: Masks | None, rows: torch.Tensor, slots: torch.Tensor) -> OfRows:
    """The masks of gate, up and down for these token slots."""
    if masks is None:
        return None, None, None
    return masks["gate"][rows, slots], masks["up"][rows, slots], masks["down"][rows, slots]


def dropped(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return value if mask is None else value * mask


def routed(expert_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, rows [n], slots [n]) for each expert that expert_ids [T, k] names, ascending; -1 is skipped."""
    for expert in torch.unique(expert_ids).tolist():
        if expert >= 0:
            rows, slots = (expert_ids == expert).nonzero(as_tuple=True)
            yield int(expert), rows, slots


def zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros (fp64, fp32 or bf16) whose pages take memory only once written.

    Most of a large layer's gradients belong to idle experts.
    """
    kinds = {torch.float64: np.float64, torch.float32: np.float32, torch.bfloat16: np.int16}
    return torch.from_numpy(np.zeros(tuple(shape), kinds[dtype])).view(dtype)


def _empty_result(inputs: LayerInputs, dtype: torch.dtype, backward: bool) -> dict[str, torch.Tensor]:
    result = {OUTPUT: zeros(inputs.hidden_states.shape, dtype)}
    if backward:
        result[GRAD_INPUT] = zeros(inputs.hidden_states.shape, dtype)
        for name in LORA_NAMES:
            result[f"grad_{name}"] = zeros(inputs.lora[name].shape, dtype)
        result[GRAD_WEIGHTS] = zeros(inputs.weights.shape, dtype)
    return result
