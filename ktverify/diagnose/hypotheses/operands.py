"""Hypotheses of a wrong operand: matrices exchanged, transposed or interleaved, or any operand replaced by another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.formulas import (
    FORMULAS,
    FORWARD,
    LEAVES,
    Change,
    ExpertValues,
    Formula,
    label,
    operands,
    with_operands,
)
from ktverify.spec.names import GRAD_INPUT, GRAD_WEIGHTS, OUTPUT

_MATRICES = {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "ga": "gate_lora_a",
    "gb": "gate_lora_b",
    "ua": "up_lora_a",
    "ub": "up_lora_b",
    "da": "down_lora_a",
    "db": "down_lora_b",
}
_TWINS = {
    "gate": "up", "ga": "ua", "gb": "ub", "x_ga": "x_ua", "g_base": "u_base", "g_lora": "u_lora", "g": "u",
    "dg": "du", "dg_gb": "du_ub", "dx_gate": "dx_up", "dx_gate_lora": "dx_up_lora",
}  # fmt: skip


_HALVES = (
    ("", tuple(FORMULAS)),
    (" in the forward", FORWARD),
    (" in the backward", tuple(stage for stage in FORMULAS if stage not in FORWARD)),
)


def leaf(name: str) -> Formula:
    """The formula that returns the value `name` unchanged."""
    return lambda v: v[name]


def exchanged_matrices(evidence: Evidence) -> Iterator[Explanation]:
    """gate and up are exchanged: base, LoRA, A, B, or all; in the whole layer, in its forward or in its backward."""
    groups = {
        "gate_proj and up_proj": ("gate",),
        "the LoRA of gate and of up": ("ga", "gb"),
        "gate_lora_a and up_lora_a": ("ga",),
        "gate_lora_b and up_lora_b": ("gb",),
        "gate and up, base and LoRA,": ("gate", "ga", "gb"),
    }
    for text, names in groups.items():
        for where, stages in _HALVES:
            change: dict[str, Formula] = {}
            for stage in stages:
                used = {n: leaf(_TWINS[n]) for n in names if n in operands(stage)}
                used |= {_TWINS[n]: leaf(n) for n in names if _TWINS[n] in operands(stage)}
                if used:
                    change[stage] = with_operands(stage, **used)
            said = f"{text} are exchanged{where}"
            yield from evidence.test(Cause.EXCHANGED_PROJECTION, said, change)
    pairs = [(f"grad_gate_{side}", f"grad_up_{side}") for side in ("lora_a", "lora_b")]
    for first, second in pairs:
        if first in evidence.actual and evidence.worth((first, second)):
            predicted = {first: evidence.right[second], second: evidence.right[first]}
            said = f"{first} and {second} are exchanged"
            yield evidence.explanation(Cause.EXCHANGED_PROJECTION, said, predicted)
    both = {a: evidence.right[b] for pair in pairs for a, b in (pair, pair[::-1])}
    yield evidence.explanation(Cause.EXCHANGED_PROJECTION, "the LoRA gradients of gate and of up are exchanged", both)


def transposed(evidence: Evidence) -> Iterator[Explanation]:
    """A matrix is read, or a gradient written, with its axes exchanged."""
    for name, tensor in _MATRICES.items():
        for text, turn in _TURNS:
            for where, stages in (("", (name,)), *((f" in {label(s)}", (s,)) for s in _users(name))):
                change = {
                    stage: _turned(name, turn) if stage == name else with_operands(stage, **{name: _turned(name, turn)})
                    for stage in stages
                }
                yield from evidence.test(Cause.TRANSPOSED, f"{tensor} is {text}{where}", change)
    for name, right in evidence.right.items():
        if not name.startswith("grad_") or name not in evidence.actual or not evidence.worth((name,), 0.05):
            continue
        for text, turn in _TURNS:
            said = f"{name} is {text}"
            yield evidence.explanation(Cause.TRANSPOSED, said, {name: turn(right)})


def _users(name: str) -> tuple[str, ...]:
    return tuple(stage for stage in FORMULAS if name in operands(stage))


def _written_transposed(value: Tensor) -> Tensor:
    return value.transpose(-1, -2).reshape(value.shape)


def _read_transposed(value: Tensor) -> Tensor:
    rows, columns = value.shape[-2:]
    return value.reshape(*value.shape[:-2], columns, rows).transpose(-1, -2)


_TURNS = (("transposed", _written_transposed), ("transposed (read column by column)", _read_transposed))


def _turned(name: str, turn: Callable[[Tensor], Tensor]) -> Formula:
    return lambda v: turn(v[name])


def substituted(evidence: Evidence) -> Iterator[Explanation]:
    """One operand of one formula is replaced by another value of its shape."""
    if not evidence.layer.experts:
        return
    shapes = {name: tuple(value.shape) for name, value in evidence.layer.experts[0].of.items()}
    order = [*LEAVES, *FORMULAS]
    for stage in FORMULAS:
        for operand in operands(stage):
            if operand == "s":
                continue
            for other in order[: order.index(stage)]:
                if other not in (operand, "w") and shapes[other] == shapes[operand] and _differs(stage, operand, other):
                    change: Change = {stage: with_operands(stage, **{operand: leaf(other)})}
                    said = f"{label(stage)} is computed with {label(other)} instead of {label(operand)}"
                    yield from evidence.test(_cause_of_exchange(stage, operand, other), said, change, rank=2)


def _differs(stage: str, operand: str, other: str) -> bool:
    # where H = I, values of different kinds have one shape
    return not (operand in _MATRICES and other not in _MATRICES) and other not in (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS)


def _cause_of_exchange(stage: str, operand: str, other: str) -> Cause:
    if operand == "dy" and other == "d_out":
        return Cause.ROUTING_WEIGHT
    if stage in ("sigma", "silu", "dsilu") or {operand, other} & {"dsilu", "sigma"} or other == "silu":
        return Cause.ACTIVATION
    return Cause.WRONG_PROJECTION


def rolled(evidence: Evidence) -> Iterator[Explanation]:
    """An operand of one formula is taken from the row before or after: another token of the expert."""
    for stage in FORMULAS:
        for operand in operands(stage):
            if operand in _MATRICES or operand == "s":
                continue
            for text, shift in (("the row before", 1), ("the next row", -1)):
                turned: Formula = lambda v, n=operand, d=shift: v[n].roll(d, 0)  # type: ignore[misc]  # noqa: E731
                said = f"{label(stage)} takes {label(operand)} from {text}"
                yield from evidence.test(
                    Cause.SLOT_WRONG, said, {stage: with_operands(stage, **{operand: turned})}, rank=2
                )


def interleaved(evidence: Evidence) -> Iterator[Explanation]:
    """gate and up are fused row by row and taken apart by halves, or the other way round."""

    def by_rows(v: ExpertValues) -> Tensor:
        return torch.stack([v["gate"], v["up"]], 1).reshape(-1, v["gate"].shape[1])

    def by_halves(v: ExpertValues) -> Tensor:
        return torch.cat([v["gate"], v["up"]])

    ways: dict[str, tuple[Formula, Formula]] = {
        "fused row by row and taken apart by halves": (
            lambda v: by_rows(v)[: len(v["gate"])],
            lambda v: by_rows(v)[len(v["gate"]) :],
        ),
        "fused one after the other and taken apart row by row": (
            lambda v: by_halves(v)[0::2],
            lambda v: by_halves(v)[1::2],
        ),
    }
    for text, (gate, up) in ways.items():
        yield from evidence.test(Cause.MEMORY_LAYOUT, f"gate_proj and up_proj are {text}", {"gate": gate, "up": up})


def two_sided(evidence: Evidence) -> Iterator[Explanation]:
    """silu is applied to the up projection in the forward."""

    def forward(v: ExpertValues) -> Tensor:
        return v["g"] * v["u"].sigmoid() * v["u"]

    yield from evidence.test(Cause.EXCHANGED_PROJECTION, "silu is applied to up, not to gate", {"h": forward})
