"""Hypotheses about a whole result: its form, values where there must be none, rows or columns shifted, exchanged."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation, certain
from ktverify.spec.names import GRAD_NAMES, TOKEN_TENSORS


def forms(evidence: Evidence) -> Iterator[Explanation]:
    """A result of another dtype or shape."""
    if evidence.forms:
        dtype = not any("[" in text for text in evidence.forms)
        more = f", and {len(evidence.forms) - 1} more" if len(evidence.forms) > 1 else ""
        cause = Cause.ACCUMULATION_TYPE if dtype else Cause.MEMORY_LAYOUT
        yield certain(cause, evidence.forms[0] + more)


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
    value = float(row[row.ne(0)][0])
    said = (
        f"{name} of {axis} {first} is not zero ({value:.3g}): {int(left.sum())} of {int(idle.sum())} have such values"
    )
    yield certain(Cause.STALE_VALUES, said)


def moved(evidence: Evidence) -> Iterator[Explanation]:
    """One result, or all LoRA gradients, is shifted by one along an axis, reversed, zero, or has the wrong sign."""
    groups: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in evidence.actual]
    groups += [("the LoRA gradients", GRAD_NAMES)]
    for text, names in groups:
        names = tuple(name for name in names if name in evidence.actual)
        if not names or not evidence.worth(names):
            continue
        right = {name: evidence.right[name] for name in names}
        yield evidence.explanation(Cause.OTHER, f"{text} is zero", {n: torch.zeros_like(t) for n, t in right.items()})
        yield evidence.explanation(Cause.OTHER, f"{text} has the wrong sign", {n: -t for n, t in right.items()})
        for axis in range(right[names[0]].dim()):
            cause, what = _axis(names[0], axis)
            for said, shift in (("shifted by one", 1), ("shifted back by one", -1)):
                predicted = {n: t.roll(shift, axis) for n, t in right.items()}
                yield evidence.explanation(cause, f"{text} is {said} along {what}", predicted)
            predicted = {n: t.flip(axis) for n, t in right.items()}
            yield evidence.explanation(cause, f"{text} is in reverse order along {what}", predicted)


def _axis(name: str, axis: int) -> tuple[Cause, str]:
    if name in GRAD_NAMES:
        return (Cause.EXPERT_PERMUTATION if axis == 0 else Cause.MEMORY_LAYOUT), ("experts", "rows", "columns")[axis]
    if name == "grad_weights":
        return Cause.SLOT_WRONG, ("tokens", "slots")[axis]
    return Cause.MEMORY_LAYOUT, ("tokens", "columns")[axis]


def tensors_exchanged(evidence: Evidence) -> Iterator[Explanation]:
    """One result contains another of the same size."""
    names = [name for name in evidence.actual if not name.startswith("grad_weights")]
    for name in names:
        for other in names:
            if name == other or evidence.right[name].numel() != evidence.right[other].numel():
                continue
            if not evidence.worth((name,)):
                continue
            value = evidence.right[other].reshape(evidence.right[name].shape)
            yield evidence.explanation(Cause.WRONG_PROJECTION, f"{name} contains {other}", {name: value})
