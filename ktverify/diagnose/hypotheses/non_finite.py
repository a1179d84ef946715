"""NaN and Inf: the first in the oracle's stages, and whether the engine has them where the oracle does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation, certain
from ktverify.diagnose.formulas import FORMULAS, LEAVES, ExpertValues, label, leaves_of
from ktverify.judge.reference import routed
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import TOKEN_TENSORS

_ROWS = frozenset(["x", "w", "d_out"])  # leaves with one row per token


@dataclass(frozen=True)
class FirstNonFinite:
    """The first value that is not finite: its stage and its index there, [row of the expert, column].

    token: -1 where the stage has no row per token.
    """

    stage: str
    expert: int
    token: int
    index: tuple[int, ...]
    value: float

    @property
    def text(self) -> str:
        """`nan in x, expert 3, token 12, index [4, 13]`."""
        token = f", token {self.token}" if self.token >= 0 else ""
        return f"{self.value} in {label(self.stage)}, expert {self.expert}{token}, index {list(self.index)}"


def first_in(inputs: Inputs) -> FirstNonFinite | None:
    """The first NaN or Inf of the oracle on these inputs, stage by stage over all experts; None if all is finite."""
    experts = [leaves_of(inputs, expert, rows, slots) for expert, rows, slots in routed(inputs.expert_ids)]
    for stage in (*LEAVES, *FORMULAS):
        for v in experts:
            if stage in FORMULAS:
                v.of[stage] = FORMULAS[stage](v)
            place = _first(v, stage)
            if place is not None:
                return place
    return None


def _first(v: ExpertValues, stage: str) -> FirstNonFinite | None:
    value = v[stage]
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return None
    index = tuple(int(i) for i in bad.nonzero()[0])
    by_token = stage in _ROWS or (stage in FORMULAS and len(value) == len(v.rows) and not stage.startswith("grad_"))
    by_token = by_token or stage in TOKEN_TENSORS
    token = int(v.rows[index[0]]) if by_token and index else -1
    return FirstNonFinite(stage, v.expert, token, index, float(value[index]) if index else float(value))


def first_of(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, tuple[int, ...], float] | None:
    """(tensor, index, value) of the first NaN or Inf where `expected` is finite; None if there is none."""
    for name, actual in tensors.items():
        bad = ~torch.isfinite(actual) & torch.isfinite(expected[name])
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            return name, index, float(actual[index])
    return None


def unexpected(evidence: Evidence) -> Iterator[Explanation]:
    """A NaN or Inf where the oracle is finite, or a finite value where the oracle has one."""
    spread = {n: d.non_finite for n, d in evidence.differences.items() if d.non_finite}
    hidden = {
        n: d.missing_non_finite for n, d in evidence.differences.items() if n in TOKEN_TENSORS and d.missing_non_finite
    }
    source = first_in(evidence.inputs) if spread or hidden else None
    given = f"; the inputs have {source.text}" if source is not None else "; the inputs and the oracle are finite"
    if spread:
        place = first_of(evidence.actual, evidence.right)
        assert place is not None
        name, index, value = place
        said = f"{value} in {name}{list(index)} where the oracle is finite ({_counts(spread)}){given}"
        yield certain(Cause.NON_FINITE, said)
    elif hidden:
        yield certain(Cause.NON_FINITE, f"NaN or Inf was hidden ({_counts(hidden)}){given}")


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in found.items())
