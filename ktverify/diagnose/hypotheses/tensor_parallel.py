"""Hypotheses of tensor parallelism: a part's share missing or added twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.diagnose.formulas import FORMULAS, Change, Formula, Values, exchanged, operands
from ktverify.spec.names import BACKWARD_TENSORS, OUTPUT

_NEAR = 0.03
# what a part holds of a token: its columns of I
_SPLIT = ("h", "dg", "du")


def tp_parts(situation: Situation) -> Iterator[Finding]:
    """Each part's share of every tensor with a factor of its own, by least squares: 0 missing, 2 added twice."""
    degree = situation.probe.tp if situation.probe is not None else 1
    if degree < 2:
        return
    yield from _one_part(situation, degree)
    parts = [situation.layer.changed(_only(part, degree, situation.case.intermediate)) for part in range(degree)]
    for where, names in (
        ("", tuple(situation.actual)),
        (" of output", (OUTPUT,)),
        (" of the gradients", BACKWARD_TENSORS),
        *((f" of {name}", (name,)) for name in BACKWARD_TENSORS),
    ):
        chosen = [{name: part[name] for name in names if name in part} for part in parts]
        if not chosen[0] or not situation.worth(names):
            continue
        moved = situation.fit(chosen)
        if moved is None:
            continue
        odd = [i for i, value in enumerate(moved.tolist()) if abs(value) > _NEAR]
        if not odd:
            continue
        predicted = {
            name: situation.right[name] + torch.stack([float(moved[i]) * chosen[i][name] for i in odd]).sum(0)
            for name in chosen[0]
        }
        said = ", ".join(f"TP part {i} of {degree}{where} {_word(1 + float(moved[i]))}" for i in odd)
        yield situation.finding(Cause.TP_PART, said, predicted, rank=1)


# where a part's share may be lost: the sum of the forward, of the backward, the columns of dh
_SUMS: dict[str, tuple[str, ...]] = {
    "the sum of the output": ("y_base", "h_da"),
    "the base's sum of the output": ("y_base",),
    "LoRA's sum of the output": ("h_da",),
    "the sum of grad_input": ("dx_gate", "dx_up", "dg_gb", "du_ub"),
    "the base's sum of grad_input": ("dx_gate", "dx_up"),
    "LoRA's sum of grad_input": ("dg_gb", "du_ub"),
}


def _one_part(situation: Situation, degree: int) -> Iterator[Finding]:
    """One part's factor in one of the layer's sums over I, or its columns of down_proj in forward and backward."""
    width = situation.case.intermediate // degree
    for part in range(degree):
        mine = torch.zeros(situation.case.intermediate, dtype=torch.float64)
        mine[part * width : (part + 1) * width] = 1
        changes = {text: _weighted(stages, mine) for text, stages in _SUMS.items()}
        changes["down_proj's product"] = lambda factor, mine=mine: {
            "down": lambda v: v["down"] * (1 + (factor - 1) * mine)
        }  # type: ignore[misc]
        for text, change in changes.items():
            fitted = situation.fit_factor(change)
            if fitted is None or abs(fitted[0] - 1) < _NEAR:
                continue
            said = f"TP part {part} of {degree} in {text} {_word(fitted[0])}"
            yield situation.finding(Cause.TP_PART, said, fitted[1])


def _weighted(stages: tuple[str, ...], mine: Tensor) -> Callable[[float], Change]:
    def operand(name: str, factor: float) -> Formula:
        return lambda v: v[name] * (1 + (factor - 1) * mine)

    def change(factor: float) -> Change:
        return {
            stage: exchanged(stage, **{name: operand(name, factor) for name in _SPLIT if name in operands(stage)})
            for stage in stages
        }

    return change


def _word(factor: float) -> str:
    if abs(factor) < _NEAR:
        return "is missing"
    return "is added twice" if abs(factor - 2) < _NEAR else f"has the factor {factor:.2f}"


def _only(part: int, degree: int, intermediate: int) -> Change:
    """What comes of one part's columns of I alone."""
    width = intermediate // degree
    keep = torch.zeros(intermediate, dtype=torch.float64)
    keep[part * width : (part + 1) * width] = 1

    def masked(name: str) -> Formula:
        def formula(v: Values) -> Tensor:
            return v[name] * keep

        return formula

    change: dict[str, Formula] = {}
    for stage in FORMULAS:
        used = {name: masked(name) for name in _SPLIT if name in operands(stage)}
        if used:
            change[stage] = exchanged(stage, **used)
    return change
