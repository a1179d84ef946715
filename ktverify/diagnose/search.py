"""Test every hypothesis on the tensors of one call and rank those that fit: least error left first, then the simplest.

Input: Evidence. Output: a Diagnosis; its `line` is what a failing case shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from ktverify.diagnose.evidence import Evidence, Explanation, Tensors
from ktverify.diagnose.hypotheses import activation, factors, operands, results, rounding, routing, tails
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import ALL_TENSORS

Family = Callable[[Evidence], Iterator[Explanation]]

# a family yields an explanation per hypothesis; the search ends after a row in which one explains all of the error
FAMILIES: tuple[tuple[Family, ...], ...] = (
    (results.forms, results.stray, results.unexpected, operands.stale),
    (
        factors.tp_parts,
        factors.lora_scale,
        factors.stage_factors,
        factors.routing_weight,
        operands.exchanged_matrices,
        operands.two_sided,
        activation.activation,
        activation.shifted,
        routing.ids_changed,
        routing.one_slot,
        routing.one_expert,
        routing.one_token,
        routing.rows_cut,
    ),
    (
        routing.permuted,
        operands.interleaved,
        results.tensors_exchanged,
        operands.transposed,
        results.moved,
        tails.k_tail,
        tails.n_tail,
    ),
    (rounding.types,),
    (operands.rolled, operands.substituted),
    (routing.where_it_is,),
)
FITS = 0.5  # share of the error that a hypothesis must explain
SOLVED = 0.9  # share of the error above which a hypothesis that leaves every tensor within its budget is the cause
_EQUAL = 1.1  # hypotheses whose left errors are within this factor fit equally well
_MOST = 3  # defects that are looked for in one call
_TRIED = 5  # hypotheses that are tried as one of several defects, of the whole and of each tensor
_QUICK = 3  # rows of FAMILIES that are asked whether they explain what a defect leaves
LARGE = 1 << 23  # base weights of active experts (elements) above which only some of the experts are examined


@dataclass
class Diagnosis:
    """What was found about one case.

    explanations: the findings, best first, each of another defect. alternatives: other hypotheses about the same error,
    which explain less, or are less simple. unexplained: failing tensors that no finding explains. unsupported: what the
    engine declares that it cannot do -> where it said so. tried: hypotheses and checks. computed: how many tensors of
    the case the engine gave; complete: whether it gave all.
    """

    case: Case
    failing: tuple[str, ...]
    explanations: list[Explanation] = field(default_factory=list)
    alternatives: list[Explanation] = field(default_factory=list)
    unexplained: tuple[str, ...] = ()
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    tried: int = 0
    note: str = ""
    computed: int = len(ALL_TENSORS)

    @property
    def complete(self) -> bool:
        return self.computed == len(ALL_TENSORS)

    @property
    def first(self) -> Explanation | None:
        return self.explanations[0] if self.explanations else None

    @property
    def line(self) -> str:
        """The first cause in one line; or that no hypothesis fits; what is unsupported; or nothing to explain."""
        if self.first is not None:
            return f"cause: {self.first.line}"
        if self.failing:
            return f"cause: none of {self.tried} hypotheses fits ({', '.join(self.failing)})"
        return next((f"UNSUPPORTED {reason}" for reason in self.unsupported), "nothing to explain")


def explain(evidence: Evidence, first: Sequence[Family] = ()) -> Diagnosis:
    """Test the hypotheses about the tensors of one call. Makes no call of the engine.

    Where none explains all of it, several defects at once are looked for: each failing tensor alone, then what the
    defects found so far leave. first: families of hypotheses that other calls of the engine have shown; where one
    explains all, no other is tested.
    """
    found: list[Explanation] = []
    several: list[Explanation] = []
    unexplained = evidence.failing
    if evidence.failing:
        with one_thread():
            found = _search(evidence, (tuple(dict.fromkeys(first)), *FAMILIES))
            plain = [each for each in found if each.left < 0]
            best = ranked([each for each in found if each.left >= 0])
            if plain or (best and _solves(best[0])):
                unexplained = ()
            # what is wrong besides a form or a NaN shows in the numbers
            if not (best and _solves(best[0])) and _over(evidence):
                several, unexplained = _several(evidence, found)
            parts = ranked(plain) + (several or best[:1])
            others = best if several else best[1:]
    else:
        parts, others = [], []
    return Diagnosis(evidence.case, evidence.failing, parts, others, unexplained, tried=len(found))


def _search(evidence: Evidence, rows: Sequence[Sequence[Family]] = FAMILIES) -> list[Explanation]:
    """An explanation for each hypothesis that was tested, with the family that it is of."""
    found: list[Explanation] = []
    for families in rows:
        for family in families:
            found += [replace(each, family=family) for each in family(evidence)]
        # a form or a NaN explains all unless numbers are over budget
        if any(_solves(each) and (each.left >= 0 or not _over(evidence)) for each in found):
            break
    return found


def _solves(each: Explanation) -> bool:
    return each.complete and each.share > SOLVED


def _over(evidence: Evidence) -> list[str]:
    """The failing tensors whose numbers are over budget."""
    return [name for name in evidence.failing if evidence.errors.get(name, 0.0) > 1.0]


# ---- several defects at once


def _several(evidence: Evidence, found: list[Explanation]) -> tuple[list[Explanation], tuple[str, ...]]:
    """(defects, tensors that they leave unexplained): each brings at least one tensor within its budget."""
    parts: list[Explanation] = []
    here = evidence
    while _over(here) and len(parts) < _MOST:
        best = _next_part(here, found)
        if best is None:
            break
        part, predicted = best
        after = here.left(predicted)
        still = here.over(after, predicted)
        fixed = tuple(name for name in _over(here) if name not in still)
        names = fixed or tuple(name for name in _over(here) if after[name] < here.errors[name])
        before, left = (sum(errors[name] for name in names) for errors in (here.errors, after))
        share = 1 - left / before if before else 0.0
        parts.append(replace(part, share=share, left=left, complete=bool(fixed), tensors=names))
        here = here.under(predicted)
        found = _search(here) if _over(here) else []
    unexplained = tuple(_over(here))
    # a defect that fixed nothing by itself counts only where all of them together explain everything
    return ([part for part in parts if part.complete or not unexplained], unexplained)


_Part = tuple[tuple[int, int, float], Explanation, Tensors]


def _next_part(here: Evidence, found: list[Explanation]) -> tuple[Explanation, Tensors] | None:
    """(hypothesis, prediction) that brings most tensors within their budgets and no other out of it."""
    whole = sorted((each for each in found if each.left >= 0 and each.share > 0), key=lambda each: each.left)[:_TRIED]
    good = _fixing(here, here, whole)
    for rows, name in product((FAMILIES[:_QUICK], FAMILIES), _over(here)) if not good else ():
        alone = here.only(name)
        good = _fixing(here, alone, [each for each in ranked(_search(alone, rows))[:_TRIED] if _solves(each)])
        if good:
            break
    # of those that fix as much, or of two defects in every tensor, one that leaves what another hypothesis explains
    likely = [part for part in good if part[0][0] == good[0][0][0]] if good else _scored(here, here, whole[:_MOST])
    for _, each, predicted in likely[:_MOST] if len(likely) > 1 or not good else ():
        rest = here.under(predicted)
        if not _over(rest) or any(_solves(other) for other in _search(rest, FAMILIES[:_QUICK])):
            return each, predicted
    return good[0][1:] if good else None


def _fixing(here: Evidence, place: Evidence, candidates: Sequence[Explanation]) -> list[_Part]:
    """Those that bring a tensor within its budget and no other out of it, best first. place: where they were found."""
    return sorted(
        (part for part in _scored(here, place, candidates) if part[0][0] > 0), key=lambda part: part[0], reverse=True
    )


def _scored(here: Evidence, place: Evidence, candidates: Sequence[Explanation]) -> list[_Part]:
    """Each with (tensors that it brings within their budgets, minus its rank, minus the error that it leaves)."""
    found: list[_Part] = []
    for each in candidates:
        predicted = predicted_by(each, place)
        if predicted is not None:
            after = here.left(predicted)
            over = here.over(after, predicted)
            broken = any(here.errors[name] <= 1.0 for name in over)
            fixed = 0 if broken else sum(name not in over for name in _over(here))
            found.append(((fixed, -each.rank, -sum(after.values())), each, predicted))
    return found


def predicted_by(each: Explanation, evidence: Evidence) -> Tensors | None:
    """The tensors that the same hypothesis predicts on this evidence; None where it cannot be tested."""
    best: tuple[float, Tensors] | None = None
    for other in each.family(evidence) if each.family is not None else ():
        if other.left >= 0 and other.says(each) and (best is None or other.left < best[0]):
            best = (other.left, evidence.predicted)
    return best[1] if best is not None else None


def proved(parts: Sequence[Explanation], evidence: Evidence, what: str) -> list[Explanation]:
    """The same findings, with a proof where they explain the evidence of another call as well. what: that call."""
    found: list[Explanation] = []
    here = evidence
    with one_thread():
        for part in parts:
            names = [name for name in part.tensors or _over(here) if name in here.actual]
            shown = ""
            for place in (here, *(here.only(name) for name in names if len(parts) > 1)):
                predicted = predicted_by(part, place)
                if predicted is None:
                    continue
                after = here.left(predicted)
                before, left = (sum(errors[name] for name in names) for errors in (here.errors, after))
                if before and 1 - left / before > SOLVED and not set(names) & set(here.over(after, predicted)):
                    shown = f"on {what} it explains {100 * (1 - left / before):.1f} % as well"
                    here = here.under(predicted)
                    break
            found.append(replace(part, proof=part.proof or shown))
    return found


def ranked(found: Sequence[Explanation]) -> list[Explanation]:
    """Those that explain at least FITS, by the error that they leave; of several that fit equally well, the simplest
    first."""
    fitting = [each for each in found if each.share >= FITS]
    order: list[Explanation] = []
    while fitting:
        least = min(each.left for each in fitting)
        equal = [each for each in fitting if each.left <= _EQUAL * max(least, 0.0) + 0.05]
        best = min(equal, key=lambda each: (each.rank, each.left))
        order.append(best)
        fitting.remove(best)
    return order


def reduced(inputs: Inputs) -> tuple[Inputs, str]:
    """(inputs, note): a large case with only some of its experts, and a note on it; a small case unchanged, and "".

    Ids of the other experts become -1, so that the engine computes these experts only.
    """
    each = 3 * inputs.case.hidden * inputs.case.intermediate
    keep = max(2, LARGE // each)
    if len(inputs.active) <= keep or len(inputs.active) * each <= LARGE:
        return inputs, ""
    chosen = inputs.active[: keep - 1] + inputs.active[-1:]
    mine = torch.isin(inputs.expert_ids, torch.tensor(chosen))
    ids = torch.where(mine, inputs.expert_ids, torch.full_like(inputs.expert_ids, -1))
    note = f"looked at experts {', '.join(map(str, chosen))} of {len(inputs.active)}; the other ids are -1"
    return replace(inputs, expert_ids=ids, active=chosen), note


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the tensors here are small, and its threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
