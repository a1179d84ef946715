"""Hypotheses of right numbers in the wrong place: tensors, experts, rows or columns of a result exchanged or moved."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.spec.names import GRAD_NAMES, TOKEN_TENSORS


def forms(situation: Situation) -> Iterator[Finding]:
    """A result of another dtype or shape."""
    if situation.forms:
        dtype = not any("[" in text for text in situation.forms)
        more = f", and {len(situation.forms) - 1} more" if len(situation.forms) > 1 else ""
        cause = Cause.ACCUMULATION_TYPE if dtype else Cause.MEMORY_LAYOUT
        yield Finding(cause, situation.forms[0] + more, 1.0, -1.0, complete=True)


def stray(situation: Situation) -> Iterator[Finding]:
    """Numbers right wherever there is one, and others where all must be zero: memory that nobody wrote."""
    guilty = [name for name in situation.failing if name in situation.actual]
    strays = [name for name in guilty if situation.differences[name].stray]
    if not strays or any(situation.differences[name].rel_l2 > situation.budgets[name] for name in guilty):
        return
    name = strays[0]
    idle = ~situation.right[name].flatten(1).any(1)
    left = situation.actual[name].flatten(1).ne(0).any(1) & idle
    axis = "token" if name in TOKEN_TENSORS else "idle expert"
    first = int(left.nonzero()[0])
    row = situation.actual[name][first].flatten()
    value = float(row[row.ne(0)][0])
    said = (
        f"{name} of {axis} {first} is not zero ({value:.3g}): {int(left.sum())} of {int(idle.sum())} hold such values"
    )
    yield Finding(Cause.STALE_VALUES, said, 1.0, -1.0, complete=True)


def moved(situation: Situation) -> Iterator[Finding]:
    """One result (or all six LoRA gradients) shifted by one along an axis, reversed, zero, or of the other sign."""
    groups: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in situation.actual]
    groups += [("the LoRA gradients", GRAD_NAMES)]
    for text, names in groups:
        names = tuple(name for name in names if name in situation.actual)
        if not names or not situation.worth(names):
            continue
        right = {name: situation.right[name] for name in names}
        yield situation.finding(Cause.OTHER, f"{text} is zero", {n: torch.zeros_like(t) for n, t in right.items()})
        yield situation.finding(Cause.OTHER, f"{text} has the wrong sign", {n: -t for n, t in right.items()})
        for axis in range(right[names[0]].dim()):
            cause, what = _axis(names[0], axis)
            for said, shift in (("shifted by one", 1), ("shifted back by one", -1)):
                predicted = {n: t.roll(shift, axis) for n, t in right.items()}
                yield situation.finding(cause, f"{text} is {said} along {what}", predicted)
            predicted = {n: t.flip(axis) for n, t in right.items()}
            yield situation.finding(cause, f"{text} is in reverse order along {what}", predicted)


def _axis(name: str, axis: int) -> tuple[Cause, str]:
    if name in GRAD_NAMES:
        return (Cause.EXPERT_PERMUTATION if axis == 0 else Cause.MEMORY_LAYOUT), ("experts", "rows", "columns")[axis]
    if name == "grad_weights":
        return Cause.SLOT_WRONG, ("tokens", "slots")[axis]
    return Cause.MEMORY_LAYOUT, ("tokens", "columns")[axis]


def tensors_exchanged(situation: Situation) -> Iterator[Finding]:
    """Two results of one shape in each other's place, or one in two places."""
    names = [name for name in situation.actual if not name.startswith("grad_weights")]
    for name in names:
        for other in names:
            if name == other or situation.right[name].numel() != situation.right[other].numel():
                continue
            if not situation.worth((name,)):
                continue
            value = situation.right[other].reshape(situation.right[name].shape)
            yield situation.finding(Cause.WRONG_PROJECTION, f"{name} holds {other}", {name: value})
