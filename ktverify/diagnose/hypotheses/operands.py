"""Hypotheses of a wrong operand: matrices exchanged, transposed, interleaved, outdated; or any operand replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.formulas import (
    FORMULAS,
    FORWARD,
    LEAVES,
    MATRICES,
    ExpertValues,
    Formula,
    LayerValues,
    label,
    leaf,
    operands,
    with_operands,
)
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import GRAD_INPUT, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

_TWINS = {
    "gate": "up", "ga": "ua", "gb": "ub", "x_ga": "x_ua", "g_base": "u_base", "g_lora": "u_lora", "g": "u",
    "dg": "du", "dg_gb": "du_ub", "dx_gate": "dx_up", "dx_gate_lora": "dx_up_lora",
}  # fmt: skip
_HALVES = (
    ("", tuple(FORMULAS)),
    (" in the forward", FORWARD),
    (" in the backward", tuple(stage for stage in FORMULAS if stage not in FORWARD)),
)


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
            yield from evidence.test(Cause.EXCHANGED_PROJECTION, f"{text} are exchanged{where}", change)
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
    for name, tensor in MATRICES.items():
        for text, turn in _TURNS:
            turned: Formula = lambda v, n=name, t=turn: t(v[n])  # type: ignore[misc]  # noqa: E731
            yield from evidence.test(Cause.TRANSPOSED, f"{tensor} is {text}", {name: turned})
            for stage in (stage for stage in FORMULAS if name in operands(stage)):
                change = {stage: with_operands(stage, **{name: turned})}
                yield from evidence.test(Cause.TRANSPOSED, f"{tensor} is {text} in {label(stage)}", change)
    for name, right in evidence.right.items():
        if not name.startswith("grad_") or name not in evidence.actual or not evidence.worth((name,), 0.05):
            continue
        for text, turn in _TURNS:
            yield evidence.explanation(Cause.TRANSPOSED, f"{name} is {text}", {name: turn(right)})


def _written_transposed(value: Tensor) -> Tensor:
    return value.transpose(-1, -2).reshape(value.shape)


def _read_transposed(value: Tensor) -> Tensor:
    rows, columns = value.shape[-2:]
    return value.reshape(*value.shape[:-2], columns, rows).transpose(-1, -2)


_TURNS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("transposed", _written_transposed),
    ("transposed (read column by column)", _read_transposed),
)


def substituted(evidence: Evidence) -> Iterator[Explanation]:
    """One operand of one formula is replaced by another value of its shape."""
    if not evidence.layer.experts:
        return
    shapes = {name: tuple(value.shape) for name, value in evidence.layer.experts[0].of.items()}
    order = [*LEAVES, *FORMULAS]
    results = (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS)
    for stage in FORMULAS:
        for operand in (name for name in operands(stage) if name != "s"):
            for other in order[: order.index(stage)]:
                # where H = I, values of different kinds have one shape
                kind = other in MATRICES or (operand not in MATRICES and other not in results)
                if kind and other not in (operand, "w") and shapes[other] == shapes[operand]:
                    change = {stage: with_operands(stage, **{operand: leaf(other)})}
                    said = f"{label(stage)} is computed with {label(other)} instead of {label(operand)}"
                    yield from evidence.test(_cause_of_exchange(stage, operand, other), said, change, rank=2)


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
            if operand in MATRICES or operand == "s":
                continue
            for text, shift in (("the row before", 1), ("the next row", -1)):
                turned: Formula = lambda v, n=operand, d=shift: v[n].roll(d, 0)  # type: ignore[misc]  # noqa: E731
                said = f"{label(stage)} takes {label(operand)} from {text}"
                change = {stage: with_operands(stage, **{operand: turned})}
                yield from evidence.test(Cause.SLOT_WRONG, said, change, rank=2)


def interleaved(evidence: Evidence) -> Iterator[Explanation]:
    """gate and up are fused row by row and taken apart by halves, or the other way round."""

    def by_rows(v: ExpertValues) -> Tensor:
        return torch.stack([v["gate"], v["up"]], 1).reshape(-1, v["gate"].shape[1])

    def by_halves(v: ExpertValues) -> Tensor:
        return torch.cat([v["gate"], v["up"]])

    ways: dict[str, dict[str, Formula]] = {
        "row by row and taken apart by halves": {
            "gate": lambda v: by_rows(v)[: len(v["gate"])],
            "up": lambda v: by_rows(v)[len(v["gate"]) :],
        },
        "one after the other and taken apart row by row": {
            "gate": lambda v: by_halves(v)[0::2],
            "up": lambda v: by_halves(v)[1::2],
        },
    }
    for text, change in ways.items():
        yield from evidence.test(Cause.MEMORY_LAYOUT, f"gate_proj and up_proj are fused {text}", change)


def two_sided(evidence: Evidence) -> Iterator[Explanation]:
    """silu is applied to the up projection in the forward."""
    change: dict[str, Formula] = {"h": lambda v: v["g"] * v["u"].sigmoid() * v["u"]}
    yield from evidence.test(Cause.EXCHANGED_PROJECTION, "silu is applied to up, not to gate", change)


# ---- LoRA of before an update

# all six, one projection, A or B; then single tensors
_GROUPS = (LORA_NAMES, LORA_NAMES[4:], LORA_NAMES[2:4], LORA_NAMES[:2], LORA_NAMES[::2], LORA_NAMES[1::2])


def stale(evidence: Evidence) -> Iterator[Explanation]:
    """Some LoRA tensors have the values of the case as drawn, where the caller has changed LoRA since."""
    drawn = make_inputs(evidence.case).lora
    if any(not torch.equal(drawn[name], tensor) for name, tensor in evidence.inputs.lora.items()):
        yield from stale_since(evidence, drawn)


def stale_since(evidence: Evidence, before: Mapping[str, Tensor], when: str = "the last") -> Iterator[Explanation]:
    """Which of the six have the values `before`: group by group, each is put back if that lowers the error.

    when: which update_lora_weights came after these values.
    """
    lora, error = dict(evidence.inputs.lora), evidence.error
    found: list[str] = []
    predicted = evidence.right
    for names in (*_GROUPS, *((name,) for name in LORA_NAMES)):
        tried = {**lora, **{name: before[name] for name in names}}
        tensors = LayerValues.of(replace(evidence.inputs, lora=tried)).tensors
        left = sum(evidence.left(tensors).values())
        if left < 0.9 * error:
            lora, error, predicted = tried, left, tensors
            found += [n for n in names if n not in found and not torch.equal(before[n], evidence.inputs.lora[n])]
    if found:
        which = "all six LoRA tensors" if len(found) == len(LORA_NAMES) else ", ".join(found)
        verb = "is that" if len(found) == 1 else "are those"
        said = f"{which} {verb} of before {when} update_lora_weights"
        yield evidence.explanation(Cause.STALE_LORA, said, predicted)


def stale_in_a_half(evidence: Evidence, name: str, before: Tensor) -> Iterator[tuple[str, Explanation]]:
    """(where, explanation): one tensor has the values `before` in the whole layer, its forward or its backward."""
    short = next(each for each, source in MATRICES.items() if source == name)
    old: Formula = lambda v: before[v.expert].to(v["x"].dtype)  # noqa: E731
    for where, stages in _HALVES:
        change = {stage: with_operands(stage, **{short: old}) for stage in stages if short in operands(stage)}
        for each in evidence.test(Cause.STALE_LORA, f"{name} is stale{where}", change):
            yield where, each
