"""NaN and Inf: which stage of the layer has the first, and what an engine made of it.

`first_in` walks the oracle's stages on the engine's inputs; `unexpected` is the hypothesis for a case that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.diagnose.formulas import FORMULAS, LEAVES, Values, label, leaves_of
from ktverify.judge.reference import routed
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import TOKEN_TENSORS

_ROWS = frozenset(["x", "w", "d_out"])  # leaves with one row per token


@dataclass(frozen=True)
class Place:
    """The first value that is not finite: stage and index in it [row of the expert, column]; token -1: no token's."""

    stage: str
    expert: int
    token: int
    index: tuple[int, ...]
    value: float

    @property
    def text(self) -> str:
        token = f", token {self.token}" if self.token >= 0 else ""
        return f"{self.value} in {label(self.stage)}, expert {self.expert}{token}, index {list(self.index)}"


def first_in(inputs: Inputs, *, magnitude: float | None = None) -> Place | None:
    """The first NaN or Inf of the layer on these inputs, stage by stage over all experts; None where all is finite.

    magnitude: also what is larger than this (what overflows in another type).
    """
    experts = [leaves_of(inputs, expert, rows, slots) for expert, rows, slots in routed(inputs.expert_ids)]
    for stage in (*LEAVES, *FORMULAS):
        for v in experts:
            if stage in FORMULAS:
                v.of[stage] = FORMULAS[stage](v)
            place = _first(v, stage, magnitude)
            if place is not None:
                return place
    return None


def _first(v: Values, stage: str, magnitude: float | None) -> Place | None:
    value = v[stage]
    bad = ~torch.isfinite(value)
    if magnitude is not None:
        bad |= value.abs() > magnitude
    if not bool(bad.any()):
        return None
    index = tuple(int(i) for i in bad.nonzero()[0])
    by_token = stage in _ROWS or (stage in FORMULAS and len(value) == len(v.rows) and not stage.startswith("grad_"))
    by_token = by_token or stage in TOKEN_TENSORS
    token = int(v.rows[index[0]]) if by_token and index else -1
    return Place(stage, v.expert, token, index, float(value[index]) if index else float(value))


def first_of(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, tuple[int, ...], float] | None:
    """(tensor, index, value) of the first NaN or Inf that `expected` has not; None where there is none."""
    for name, actual in tensors.items():
        bad = ~torch.isfinite(actual) & torch.isfinite(expected[name])
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            return name, index, float(actual[index])
    return None


def unexpected(situation: Situation) -> Iterator[Finding]:
    """A NaN or Inf where the oracle has none, or none where the oracle has one."""
    spread = {n: d.non_finite for n, d in situation.differences.items() if d.non_finite}
    hidden = {
        n: d.missing_non_finite for n, d in situation.differences.items() if n in TOKEN_TENSORS and d.missing_non_finite
    }
    source = first_in(situation.inputs) if spread or hidden else None
    given = f"; the inputs have {source.text}" if source is not None else "; the inputs and the oracle are finite"
    if spread:
        place = first_of(situation.actual, situation.right)
        assert place is not None
        name, index, value = place
        said = f"{value} in {name}{list(index)} where the oracle is finite ({_counts(spread)}){given}"
        yield _certain(Cause.NON_FINITE, said)
    elif hidden:
        yield _certain(Cause.NON_FINITE, f"NaN or Inf was hidden ({_counts(hidden)}){given}")


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in found.items())


def _certain(cause: Cause, text: str) -> Finding:
    return Finding(cause, text, 1.0, -1.0, complete=True)
