"""Hypotheses about a whole result: its form, NaN and Inf, values where there must be none, moved, exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.judging import form_cause
from ktverify.diagnose.evidence import Evidence, Explanation, stated
from ktverify.diagnose.formulas import FORMULAS, LEAVES, label, leaves_of
from ktverify.diagnose.hypotheses.tails import axis_name
from ktverify.judge.reference import routed
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import GRAD_NAMES, GRAD_WEIGHTS, TOKEN_TENSORS

_MOVES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "shifted by one": lambda value, axis: value.roll(1, axis),
    "shifted back by one": lambda value, axis: value.roll(-1, axis),
    "in reverse order": lambda value, axis: value.flip(axis),
}


def forms(evidence: Evidence) -> Iterator[Explanation]:
    """A result of another dtype or shape."""
    if evidence.forms:
        causes = [form_cause(text) for text in evidence.forms]
        more = f", and {len(evidence.forms) - 1} more" if len(evidence.forms) > 1 else ""
        cause = Cause.MEMORY_LAYOUT if Cause.MEMORY_LAYOUT in causes else Cause.ACCUMULATION_TYPE
        yield stated(cause, evidence.forms[0] + more)


def stray(evidence: Evidence) -> Iterator[Explanation]:
    """Rows that must be zero are not, and all others are right: memory that was not written."""
    guilty = [name for name in evidence.failing if name in evidence.actual]
    strays = [name for name in guilty if evidence.differences[name].stray]
    if not strays or any(evidence.differences[name].rel_l2 > evidence.budgets[name] for name in guilty):
        return
    name = strays[0]
    idle = ~evidence.right[name].flatten(1).any(1)
    left = evidence.actual[name].flatten(1).ne(0).any(1) & idle
    axis = "token" if name in TOKEN_TENSORS else "idle expert"
    first = int(left.nonzero()[0])
    row = evidence.actual[name][first].flatten()
    what = f"{name} of {axis} {first} is not zero ({float(row[row.ne(0)][0]):.3g})"
    yield stated(Cause.STALE_VALUES, f"{what}: {int(left.sum())} of {int(idle.sum())} have such values")


def moved(evidence: Evidence) -> Iterator[Explanation]:
    """One result, or all LoRA gradients, is shifted by one along an axis, reversed, zero, or has the wrong sign."""
    for text, names in (*((name, (name,)) for name in evidence.actual), ("the LoRA gradients", GRAD_NAMES)):
        right = {name: evidence.right[name] for name in names if name in evidence.actual}
        if not right or not evidence.worth(tuple(right)):
            continue
        yield evidence.explanation(Cause.OTHER, f"{text} is zero", {n: torch.zeros_like(t) for n, t in right.items()})
        yield evidence.explanation(Cause.OTHER, f"{text} has the wrong sign", {n: -t for n, t in right.items()})
        first = next(iter(right))
        for axis in range(right[first].dim()):
            what = axis_name(first, axis)
            cause = Cause.EXPERT_PERMUTATION if what == "expert" else Cause.MEMORY_LAYOUT
            cause = Cause.SLOT_WRONG if first == GRAD_WEIGHTS else cause
            for said, move in _MOVES.items():
                predicted = {name: move(tensor, axis) for name, tensor in right.items()}
                yield evidence.explanation(cause, f"{text} is {said} along {what}s", predicted)


def tensors_exchanged(evidence: Evidence) -> Iterator[Explanation]:
    """One result contains another of the same size."""
    names = [name for name in evidence.actual if name != GRAD_WEIGHTS]
    for name in names:
        for other in names:
            right, value = evidence.right[name], evidence.right[other]
            if name != other and right.numel() == value.numel() and evidence.worth((name,)):
                said = f"{name} contains {other}"
                yield evidence.explanation(Cause.WRONG_PROJECTION, said, {name: value.reshape(right.shape)})


# ---- NaN and Inf


def first_in(inputs: Inputs) -> tuple[int, str] | None:
    """(expert, text) of the first NaN or Inf of the oracle, stage by stage over all experts; None if all is finite.

    text: `nan in x, expert 3, token 12, index [4, 13]`; index: row of the expert, column.
    """
    experts = [leaves_of(inputs, expert, rows, slots) for expert, rows, slots in routed(inputs.expert_ids)]
    for stage in (*LEAVES, *FORMULAS):
        for v in experts:
            if stage in FORMULAS:
                v.of[stage] = FORMULAS[stage](v)
            value = v[stage]
            index = _first_true(~torch.isfinite(value))
            if index is not None:
                by_token = stage in FORMULAS and len(value) == len(v.rows) and not stage.startswith("grad_")
                by_token = by_token or stage in ("x", "w", "d_out") or stage in TOKEN_TENSORS
                token = f", token {int(v.rows[index[0]])}" if by_token else ""
                place = f"expert {v.expert}{token}, index {list(index)}"
                return v.expert, f"{float(value[index])} in {label(stage)}, {place}"
    return None


def first_of(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, tuple[int, ...], float] | None:
    """(tensor, index, value) of the first NaN or Inf where `expected` is finite; None if there is none."""
    for name, actual in tensors.items():
        index = _first_true(~torch.isfinite(actual) & torch.isfinite(expected[name]))
        if index is not None:
            return name, index, float(actual[index])
    return None


def _first_true(mask: Tensor) -> tuple[int, ...] | None:
    return tuple(mask.nonzero()[0].tolist()) if bool(mask.any()) else None


def unexpected(evidence: Evidence) -> Iterator[Explanation]:
    """A NaN or Inf where the oracle is finite, or a finite value where the oracle has one."""
    found = evidence.differences
    spread = {name: found[name].non_finite for name in found}
    hidden = {name: found[name].missing_non_finite for name in found if name in TOKEN_TENSORS}
    if not any(spread.values()) and not any(hidden.values()):
        return
    source = first_in(evidence.inputs)
    given = f"; the inputs have {source[1]}" if source is not None else "; the inputs and the oracle are finite"
    place = first_of(evidence.actual, evidence.right)
    if place is not None:
        name, index, value = place
        where = f"{value} in {name}{list(index)} where the oracle is finite"
        yield stated(Cause.NON_FINITE, f"{where} ({_counts(spread)}){given}")
    else:
        yield stated(Cause.NON_FINITE, f"NaN or Inf was hidden ({_counts(hidden)}){given}")


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in found.items() if count)
