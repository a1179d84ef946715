"""Hypotheses of a tail: a sum stops early (K), the end of a result is wrong (N), or rows are left out of a sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.formulas import FORMULAS, FORWARD, LEAVES, ExpertValues, Formula, label, operands, with_operands
from ktverify.spec.names import GRAD_NAMES, TOKEN_TENSORS

BLOCKS = (2, 4, 8, 16, 32, 64, 128, 256)
# axis -> the operands whose last axis a product sums over
_SUMS: dict[str, tuple[str, ...]] = {
    "H": ("x", "dy", "d_out"),
    "I": ("h", "dg", "du"),
    "r": ("x_ga", "x_ua", "h_da", "dy_db", "dg_gb", "du_ub"),
}
_SUMMED = frozenset(name for names in _SUMS.values() for name in names)
_OUTER = frozenset(GRAD_NAMES)  # sums over rows: columns of their operands are no tail of the sum


def k_tail(evidence: Evidence) -> Iterator[Explanation]:
    """A sum over H, I or r stops before its end: in one product, in the forward, or everywhere."""
    case = evidence.case
    for size, (axis, names) in zip((case.hidden, case.intermediate, case.rank), _SUMS.items(), strict=True):
        for first in _cuts(size):
            for where, stages in _groups(names):
                cut = {name: _without(name, first, size) for name in names}
                change = {s: with_operands(s, **{n: cut[n] for n in operands(s) if n in cut}) for s in stages}
                said = f"the sum over {axis}{where} stops at {first} of {size}"
                yield from evidence.test(Cause.K_TAIL, said, change, rank=1 if len(stages) > 1 else 2)
    yield from _cut_inputs(evidence)
    yield from _rows_left_out(evidence)


def _cut_inputs(evidence: Evidence) -> Iterator[Explanation]:
    """The last columns of an input, a weight or a stage count as zero in every formula."""
    case = evidence.case
    sizes = {case.hidden: "H", case.intermediate: "I", case.rank: "r"}
    if not evidence.layer.experts:
        return
    for name, value in evidence.layer.experts[0].of.items():
        if value.dim() != 2 or name in _OUTER or name == "w" or value.shape[1] not in sizes:
            continue
        cause = Cause.K_TAIL if name in LEAVES or name in _SUMMED else Cause.N_TAIL
        for first in _cuts(value.shape[1]):
            formula = FORMULAS.get(name, lambda v, name=name: v[name])
            change: dict[str, Formula] = {name: _cut(formula, first)}
            said = f"columns {first} to {value.shape[1] - 1} of {label(name)} count as zero"
            yield from evidence.test(cause, said, change)


def _cut(formula: Formula, first: int) -> Formula:
    def cut(v: ExpertValues) -> Tensor:
        value = formula(v).clone()
        value[:, first:] = 0
        return value

    return cut


def _groups(names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    stages = tuple(s for s in FORMULAS if s not in _OUTER and any(n in operands(s) for n in names))
    products = tuple(s for s in stages if s not in ("g", "u", "dy", "silu", "du", "dg", "h"))
    yield "", products
    yield " in the forward", tuple(stage for stage in products if stage in FORWARD)
    for stage in products:
        yield f" in {label(stage)}", (stage,)


def _cuts(size: int) -> list[int]:
    ends = {size // block * block for block in BLOCKS} | {size - 1}
    return sorted((end for end in ends if 0 < end < size), reverse=True)


def _without(name: str, first: int, size: int) -> Formula:
    return lambda v: v[name] * (torch.arange(size) < first).double()


def _rows_left_out(evidence: Evidence) -> Iterator[Explanation]:
    """A LoRA gradient, a sum over the expert's rows, stops early, or leaves out the first or last row."""
    if not evidence.worth(GRAD_NAMES):
        return
    for names in (GRAD_NAMES, *((name,) for name in GRAD_NAMES)):
        where = "the LoRA gradients" if len(names) > 1 else names[0]
        for text, keep in _ROWS:
            change = {
                stage: with_operands(stage, **{first: lambda v, n=first, k=keep: _rows_kept(v[n], k)})
                for stage, first in ((name, operands(name)[1]) for name in names)
            }
            said = f"the sum over tokens in {where} {text}"
            yield from evidence.test(Cause.TOKEN_TAIL, said, change, rank=1 if len(names) > 1 else 2)


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


def n_tail(evidence: Evidence) -> Iterator[Explanation]:
    """All error of a tensor is at the end, or at the start, of one of its axes."""
    places: list[tuple[float, str, str]] = []
    for name, error in evidence.errors.items():
        if error < 0.02 * evidence.error:
            continue
        apart = (evidence.actual[name] - evidence.right[name]).square()
        apart = torch.where(torch.isfinite(apart), apart, 0.0)
        for axis in range(apart.dim()):
            along = apart.sum(tuple(other for other in range(apart.dim()) if other != axis))
            place = _end_of(along)
            if place is not None:
                places.append((error, name, f"{axis_name(name, axis)} {place}"))
                break
    share = sum(error for error, _, _ in places) / evidence.error if evidence.error else 0.0
    if share < 0.5:
        return
    said = "; ".join(f"{name}: all of the error is at {place}" for _, name, place in sorted(places, reverse=True)[:3])
    yield Explanation(Cause.N_TAIL, said, 0.95 * share, (1 - 0.95 * share) * evidence.error, rank=4)


def _end_of(along: Tensor) -> str | None:
    """`40 to 47 of 48` if nearly all squared error is at one end of an axis, in less than a third of it."""
    size, total = len(along), float(along.sum())
    if size < 3 or total <= 0:
        return None
    for text, order in (("end", along), ("start", along.flip(0))):
        kept = order.flip(0).cumsum(0) / total
        count = int((kept < 0.9).sum()) + 1  # elements at this end with nine tenths of the error
        if count <= size // 3 and count < 0.45 * size:
            first, last = (size - count, size - 1) if text == "end" else (0, count - 1)
            return f"{first} to {last} of {size}" if count > 1 else f"{first} of {size}"
    return None


def axis_name(name: str, axis: int) -> str:
    """`expert`, `row`, `column`, `token` or `slot`: what an axis of a result counts."""
    if name in TOKEN_TENSORS:
        return ("token", "slot" if name == "grad_weights" else "column")[axis]
    return ("expert", "row", "column")[axis]


def axis_words(name: str, index: Iterable[int]) -> str:
    """`expert 3, row 5, column 41`."""
    return ", ".join(f"{axis_name(name, axis)} {place}" for axis, place in enumerate(index))
