"""Proof that a case is exact: with bf16 operands and fp32 sums in any order, it has one right answer.

An engine whose bits differ from the oracle's on such a case has computed something else; no tolerance is needed.

A product of two bf16 numbers is exact in fp32. A sum of multiples of a unit (a power of two) is exact in fp32, in any
order and split in any way, while the sum of its terms' absolute values is below 2^24 units. So it is enough that every
operand that an engine may round to bf16 is a bf16 number, and that every sum keeps that bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ktverify.errors import NotExact
from ktverify.judge.reference import routed, zeros
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import GRAD_INPUT, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

_FP32_BITS = 24
# silu(g) is g above this and 0 below that, and silu'(g) 1 and 0, in fp32 and fp64: e^-40 < 2^-53, e^746 overflows
_OPEN, _SHUT = 40.0, -746.0
_GRAIN = 40  # the smallest unit is 2^-40


@dataclass
class _Sum:
    """A partial sum: value and bound (sum of absolute terms), fp64 of one shape; unit divides every term."""

    value: torch.Tensor
    bound: torch.Tensor
    unit: float = math.inf

    def add(self, other: _Sum, rows: torch.Tensor | None = None) -> None:
        if rows is None:
            self.value = self.value + other.value
            self.bound = self.bound + other.bound
        else:
            self.value.index_add_(0, rows, other.value)
            self.bound.index_add_(0, rows, other.bound)
        self.unit = min(self.unit, other.unit)

    def scaled(self, factor: float) -> _Sum:
        return _Sum(self.value * factor, self.bound * factor, self.unit * factor)


@dataclass
class Proof:
    """bits: for each sum, how many of the 24 bits of fp32 its largest element needs at most."""

    bits: dict[str, float] = field(default_factory=dict)

    def see(self, name: str, total: _Sum) -> torch.Tensor:
        """The sum's value [any shape]. NotExact where one of its elements may round in fp32."""
        largest = float(total.bound.max()) if total.bound.numel() else 0.0
        if largest > 0:
            bits = math.log2(largest / total.unit)
            self.bits[name] = max(self.bits.get(name, 0.0), bits)
            if bits >= _FP32_BITS:
                raise NotExact(f"{name}: terms add up to {largest:g}, that is 2^{bits:.1f} units of {total.unit:g}")
        return total.value

    def operand(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """`value`, if each element is a bf16 number; NotExact otherwise."""
        if not torch.equal(value.to(torch.bfloat16).double(), value):
            raise NotExact(f"{name}: an engine that rounds it to bf16 loses bits")
        return value


def prove(inputs: Inputs) -> Proof:
    """The bits that each sum of forward and backward of `inputs` needs; NotExact unless every sum is exact."""
    proof = Proof()
    see, operand = proof.see, proof.operand
    s = inputs.case.scaling
    shape = inputs.hidden_states.shape
    output, grad_input = (_Sum(zeros(shape, torch.float64), zeros(shape, torch.float64)) for _ in range(2))
    for expert, rows, slots in routed(inputs.expert_ids):
        x = inputs.hidden_states[rows].double()
        d_out = inputs.grad_output[rows].double()
        w = operand("weights", inputs.weights[rows, slots].double().unsqueeze(1))
        gate, up, down = (t[expert].double() for t in (inputs.gate_proj, inputs.up_proj, inputs.down_proj))
        ga, gb, ua, ub, da, db = (operand(name, inputs.lora[name][expert].double()) for name in LORA_NAMES)

        x_ga = operand("x gate_a", see("x gate_a", _product(x, ga.T)))
        x_ua = operand("x up_a", see("x up_a", _product(x, ua.T)))
        g = operand("gate", see("gate", _with_lora(_product(x, gate.T), _product(x_ga, gb.T), s)))
        u = operand("up", see("up", _with_lora(_product(x, up.T), _product(x_ua, ub.T), s)))
        if not bool(((g >= _OPEN) | (g <= _SHUT)).all()):
            raise NotExact("gate: an element is neither open nor shut, so silu rounds")
        silu = torch.where(g > 0, g, 0.0)
        h = operand("h", silu * u)
        h_da = operand("h down_a", see("h down_a", _product(h, da.T)))
        y_sum = _with_lora(_product(h, down.T), _product(h_da, db.T), s)
        y = see("y", y_sum)
        output.add(_Sum(w * y, w * y_sum.bound, y_sum.unit * _unit(w)), rows)

        inner = _Sum((d_out * y).sum(1), (d_out.abs() * y_sum.bound).sum(1), _unit(d_out) * y_sum.unit)
        see(GRAD_WEIGHTS, inner)
        dy = operand("dy", w * d_out)
        dy_db = operand("dy down_b", see("dy down_b", _product(dy, db)))
        dh = operand("dh", see("dh", _with_lora(_product(dy, down), _product(dy_db, da), s)))
        see("grad_down_lora_b", _product(dy.T, h_da).scaled(s))
        see("grad_down_lora_a", _product(dy_db.T, h).scaled(s))
        dg = operand("dg", torch.where(g > 0, dh * u, 0.0))
        du = operand("du", dh * silu)
        dg_gb = operand("dg gate_b", see("dg gate_b", _product(dg, gb)))
        du_ub = operand("du up_b", see("du up_b", _product(du, ub)))
        see("grad_gate_lora_b", _product(dg.T, x_ga).scaled(s))
        see("grad_gate_lora_a", _product(dg_gb.T, x).scaled(s))
        see("grad_up_lora_b", _product(du.T, x_ua).scaled(s))
        see("grad_up_lora_a", _product(du_ub.T, x).scaled(s))
        dx = _with_lora(_product(dg, gate), _product(dg_gb, ga), s)
        dx.add(_with_lora(_product(du, up), _product(du_ub, ua), s))
        grad_input.add(dx, rows)
    see(OUTPUT, output)
    see(GRAD_INPUT, grad_input)
    return proof


def _product(a: torch.Tensor, b: torch.Tensor) -> _Sum:
    return _Sum(a @ b, a.abs() @ b.abs(), _unit(a) * _unit(b))


def _with_lora(base: _Sum, low: _Sum, scaling: float) -> _Sum:
    base.add(low.scaled(scaling))
    return base


def _unit(value: torch.Tensor) -> float:
    """The largest power of two that divides every element; inf where all are zero."""
    grains = value * 2.0**_GRAIN
    whole = grains.to(torch.int64)
    if bool((value.abs() >= 2.0 ** (62 - _GRAIN)).any()) or not torch.equal(whole.double(), grains):
        raise NotExact(f"an operand is no multiple of 2^-{_GRAIN} below 2^{62 - _GRAIN}")
    if not bool(whole.any()):
        return math.inf
    lowest = whole & -whole
    return float(lowest[lowest != 0].min()) * 2.0**-_GRAIN
