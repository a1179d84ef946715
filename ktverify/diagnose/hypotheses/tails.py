"""Hypotheses of an end: a sum that stops early (tail of K), a result whose end is wrong (tail of N), rows left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.diagnose.formulas import FORMULAS, LEAVES, Formula, Values, exchanged, label, operands
from ktverify.spec.names import GRAD_NAMES, OUTPUT, TOKEN_TENSORS

BLOCKS = (2, 4, 8, 16, 32, 64, 128, 256)
# the operand whose last axis a product sums over, and that sum's size; T: over an expert's rows
_SUMS: dict[str, tuple[tuple[str, int], ...]] = {
    "H": (("x", 1), ("dy", 1), ("d_out", 1)),
    "I": (("h", 1), ("dg", 1), ("du", 1)),
    "r": (("x_ga", 1), ("x_ua", 1), ("h_da", 1), ("dy_db", 1), ("dg_gb", 1), ("du_ub", 1)),
}
_SUMMED = frozenset(name for sums in _SUMS.values() for name, _ in sums)
_OUTER = frozenset(GRAD_NAMES)  # these sum over rows: a tail of their operands' columns is no tail of a sum


def k_tail(situation: Situation) -> Iterator[Finding]:
    """A sum over H, I or r that stops before its end, in one product, in the forward, or everywhere."""
    case = situation.case
    for size, (axis, sums) in zip((case.hidden, case.intermediate, case.rank), _SUMS.items(), strict=True):
        for first in _cuts(size):
            for where, stages in _groups([name for name, _ in sums]):
                change: dict[str, Formula] = {}
                for stage in stages:
                    cut = {n: _without(n, first, size) for n, _ in sums if n in operands(stage)}
                    if cut:
                        change[stage] = exchanged(stage, **cut)
                said = f"the sum over {axis}{where} stops at {first} of {size}"
                yield from situation.tried(Cause.K_TAIL, said, change, rank=1 if len(stages) > 1 else 2)
    yield from _cut_inputs(situation)
    yield from _rows_left_out(situation)


def _cut_inputs(situation: Situation) -> Iterator[Finding]:
    """The last columns of an input, a weight or a stage count as zero wherever they are used."""
    case = situation.case
    sizes = {case.hidden: "H", case.intermediate: "I", case.rank: "r"}
    if not situation.layer.experts:
        return
    for name, value in situation.layer.experts[0].of.items():
        if value.dim() != 2 or name in _OUTER or name == "w" or value.shape[1] not in sizes:
            continue
        cause = Cause.K_TAIL if name in LEAVES or name in _SUMMED else Cause.N_TAIL
        for first in _cuts(value.shape[1]):
            formula = FORMULAS.get(name, lambda v, name=name: v[name])
            change: dict[str, Formula] = {name: _cut(formula, first)}
            said = f"columns {first} to {value.shape[1] - 1} of {label(name)} count as zero"
            yield from situation.tried(cause, said, change)


def _cut(formula: Formula, first: int) -> Formula:
    def cut(v: Values) -> Tensor:
        value = formula(v).clone()
        value[:, first:] = 0
        return value

    return cut


def _groups(names: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    stages = tuple(s for s in FORMULAS if s not in _OUTER and any(n in operands(s) for n in names))
    products = tuple(s for s in stages if s not in ("g", "u", "dy", "silu", "du", "dg", "h"))
    forward = tuple(s for s in products if list(FORMULAS).index(s) < list(FORMULAS).index(OUTPUT))
    yield "", products
    yield " in the forward", forward
    for stage in products:
        yield f" in {label(stage)}", (stage,)


def _cuts(size: int) -> list[int]:
    ends = {size // block * block for block in BLOCKS} | {size - 1}
    return sorted((end for end in ends if 0 < end < size), reverse=True)


def _without(name: str, first: int, size: int) -> Formula:
    def formula(v: Values) -> Tensor:
        keep = (torch.arange(size) < first).double()
        return v[name] * keep

    return formula


def _rows_left_out(situation: Situation) -> Iterator[Finding]:
    """The sum over an expert's rows that a LoRA gradient is stops early, or leaves out its first or last row."""
    if not situation.worth(GRAD_NAMES):
        return
    for names in (GRAD_NAMES, *((name,) for name in GRAD_NAMES)):
        where = "the LoRA gradients" if len(names) > 1 else names[0]
        for text, keep in _ROWS:
            change = {
                stage: exchanged(stage, **{first: lambda v, n=first, k=keep: _rows_kept(v[n], k)})
                for stage, first in ((name, operands(name)[1]) for name in names)
            }
            said = f"the sum over tokens in {where} {text}"
            yield from situation.tried(Cause.TOKEN_TAIL, said, change, rank=1 if len(names) > 1 else 2)


def _rows_kept(value: Tensor, keep: slice | int) -> Tensor:
    rows = len(value)
    if isinstance(keep, int):
        keep = slice(0, rows // keep * keep or rows)
    mask = torch.zeros(rows, 1, dtype=value.dtype)
    mask[keep] = 1
    return value * mask


_ROWS: tuple[tuple[str, slice | int], ...] = (
    ("leaves out each expert's last token", slice(0, -1)),
    ("leaves out each expert's first token", slice(1, None)),
    *((f"stops at a multiple of {block}", block) for block in BLOCKS if block > 1),
    *((f"stops after {count}", slice(0, count)) for count in (16, 32, 64, 128, 256)),
)


def n_tail(situation: Situation) -> Iterator[Finding]:
    """All of a tensor's error stands in the end (or the beginning) of one of its axes."""
    places: list[tuple[float, str, str]] = []
    for name, error in situation.errors.items():
        if error < 0.02 * situation.error:
            continue
        apart = _squares(situation, name)
        for axis in range(apart.dim()):
            along = apart.sum(tuple(other for other in range(apart.dim()) if other != axis))
            place = _end_of(along)
            if place is not None:
                places.append((error, name, f"{_axis(name, axis)} {place}"))
                break
    share = sum(error for error, _, _ in places) / situation.error if situation.error else 0.0
    if share < 0.5:
        return
    said = "; ".join(f"{name}: all of the error is at {place}" for _, name, place in sorted(places, reverse=True)[:3])
    yield Finding(Cause.N_TAIL, said, 0.95 * share, (1 - 0.95 * share) * situation.error, rank=4)


def _squares(situation: Situation, name: str) -> Tensor:
    apart = (situation.actual[name] - situation.right[name]).square()
    return torch.where(torch.isfinite(apart), apart, 0.0)


def _end_of(along: Tensor) -> str | None:
    """`40 to 47 of 48` where nearly all of the squared error is in less than a third of an axis, at one end."""
    size, total = len(along), float(along.sum())
    if size < 3 or total <= 0:
        return None
    for text, order in (("end", along), ("start", along.flip(0))):
        kept = order.flip(0).cumsum(0) / total
        count = int((kept < 0.9).sum()) + 1  # how many at this end hold nine tenths
        if count <= size // 3 and count < 0.45 * size:
            first, last = (size - count, size - 1) if text == "end" else (0, count - 1)
            return f"{first} to {last} of {size}" if count > 1 else f"{first} of {size}"
    return None


def _axis(name: str, axis: int) -> str:
    if name in TOKEN_TENSORS:
        return ("token", "slot" if name == "grad_weights" else "column")[axis]
    return ("expert", "row", "column")[axis]


def axis_words(name: str, index: Iterable[int]) -> str:
    """`expert 3, row 5, column 41`."""
    return ", ".join(f"{_axis(name, axis)} {place}" for axis, place in enumerate(index))
