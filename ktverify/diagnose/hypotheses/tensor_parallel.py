"""Hypotheses of tensor parallelism: the share of one part is missing or added twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import NEAR, Evidence, Explanation
from ktverify.diagnose.formulas import FORMULAS, Change, Formula, operands, with_operands
from ktverify.spec.names import BACKWARD_TENSORS, OUTPUT

# the values that are split by columns of I
_SPLIT = ("h", "dg", "du")
# where the share of a part may be lost: the stages of a sum over I
_SUMS: dict[str, tuple[str, ...]] = {
    "the sum of the output": ("y_base", "h_da"),
    "the base's sum of the output": ("y_base",),
    "LoRA's sum of the output": ("h_da",),
    "the sum of grad_input": ("dx_gate", "dx_up", "dg_gb", "du_ub"),
    "the base's sum of grad_input": ("dx_gate", "dx_up"),
    "LoRA's sum of grad_input": ("dg_gb", "du_ub"),
}


def tp_parts(evidence: Evidence) -> Iterator[Explanation]:
    """Each part's share of every tensor with a factor of its own: 0 where it is missing, 2 where it is added twice."""
    degree, size = evidence.tp, evidence.case.intermediate
    if degree < 2:
        return
    masks = [_columns(part, degree, size) for part in range(degree)]
    for part, mine in enumerate(masks):
        yield from _one_part(evidence, f"TP part {part} of {degree}", mine)
    parts = [evidence.layer.changed(_weighted(FORMULAS, 1 - mine)(0.0)) for mine in masks]
    for where, names in (
        ("", tuple(evidence.actual)),
        (" of output", (OUTPUT,)),
        (" of the gradients", BACKWARD_TENSORS),
        *((f" of {name}", (name,)) for name in BACKWARD_TENSORS),
    ):
        fitted = evidence.fit_shares(parts, names)
        if fitted is not None:
            said = ", ".join(f"TP part {i} of {degree}{where} {_word(factor)}" for i, factor in fitted[0].items())
            yield evidence.explanation(Cause.TP_PART, said, fitted[1])


def _one_part(evidence: Evidence, what: str, mine: Tensor) -> Iterator[Explanation]:
    """One part's factor in one of the sums over I, or in its columns of down_proj in forward and backward."""
    changes = {text: _weighted(stages, mine) for text, stages in _SUMS.items()}
    changes["down_proj's product"] = lambda factor: {"down": lambda v: v["down"] * (1 + (factor - 1) * mine)}
    for text, change in changes.items():
        fitted = evidence.fit_factor(change)
        if fitted is not None and abs(fitted[0] - 1) >= NEAR:
            yield evidence.explanation(Cause.TP_PART, f"{what} in {text} {_word(fitted[0])}", fitted[1])


def _columns(part: int, degree: int, size: int) -> Tensor:
    """[I] 1 in the columns of one part, 0 elsewhere."""
    mine = torch.zeros(degree, size // degree, dtype=torch.float64)
    mine[part] = 1
    return torch.cat([mine.flatten(), torch.zeros(size % degree, dtype=torch.float64)])


def _weighted(stages: Iterable[str], mine: Tensor) -> Callable[[float], Change]:
    """The columns `mine` [I] of what is split get a factor, in these stages."""

    def operand(name: str, factor: float) -> Formula:
        return lambda v: v[name] * (1 + (factor - 1) * mine)

    used = {stage: [name for name in _SPLIT if name in operands(stage)] for stage in stages}
    return lambda factor: {
        stage: with_operands(stage, **{name: operand(name, factor) for name in names})
        for stage, names in used.items()
        if names
    }


def _word(factor: float) -> str:
    if abs(factor) < NEAR:
        return "is missing"
    return "is added twice" if abs(factor - 2) < NEAR else f"has the factor {factor:.2f}"
