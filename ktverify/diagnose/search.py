"""Test every hypothesis on the tensors of one call and rank those that fit: least error left first, then the simplest.

Input: Evidence. Output: a Diagnosis; its `line` is what a failing case shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.hypotheses import activation, factors, operands, results, rounding, routing, tails
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs

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
_EQUAL = 1.1  # hypotheses whose left errors are within this factor fit equally well
LARGE = 1 << 23  # base weights of active experts (elements) above which only some of the experts are examined


@dataclass
class Diagnosis:
    """What was found about one case. explanations: those that fit, best first. tried: hypotheses and checks."""

    case: Case
    failing: tuple[str, ...]
    explanations: list[Explanation] = field(default_factory=list)
    tried: int = 0
    note: str = ""

    @property
    def first(self) -> Explanation | None:
        return self.explanations[0] if self.explanations else None

    @property
    def line(self) -> str:
        """The first cause in one line; or that no hypothesis fits; or that there is nothing to explain."""
        if self.first is not None:
            return f"cause: {self.first.line}"
        if not self.failing:
            return "nothing to explain"
        return f"cause: none of {self.tried} hypotheses fits ({', '.join(self.failing)})"


def explain(evidence: Evidence) -> Diagnosis:
    """Test the hypotheses about the tensors of one call. Makes no call of the engine."""
    found: list[Explanation] = []
    if evidence.failing:
        with one_thread():
            for families in FAMILIES:
                for family in families:
                    found += family(evidence)
                if any(each.complete and each.share > 0.9 for each in found):
                    break
    return Diagnosis(evidence.case, evidence.failing, ranked(found), len(found))


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
