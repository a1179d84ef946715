"""Hypotheses of right numbers in the wrong place: tensors, experts, rows or columns of a result exchanged or moved."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktverify.diagnose.causes import Cause
from ktverify.diagnose.situation import Finding, Situation
from ktverify.names import GRAD_NAMES


def moved(situation: Situation) -> Iterator[Finding]:
    """One result (or all six LoRA gradients) shifted by one along an axis, reversed, zero, or of the other sign."""
    groups = [(name, (name,)) for name in situation.actual]
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
