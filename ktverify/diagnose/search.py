"""The search: every hypothesis is tried, the one that leaves the least error comes first, among equals the simplest.

Comes in: a case and an engine. Goes out: a `Diagnosis`, whose `line` is what stands below a failing check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ktverify.diagnose.evidence import Finding, Probe, Situation, Tensors
from ktverify.diagnose.hypotheses import (
    activation,
    factors,
    misplaced,
    non_finite,
    operands,
    rounding,
    routing,
    tails,
    tensor_parallel,
)
from ktverify.engines import registry
from ktverify.engines.registry import EngineFactory
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS

Family = Callable[[Situation], Iterator[Finding]]

# a family yields a finding for each of its hypotheses; what explains all of the error ends the search after its row
FAMILIES: tuple[tuple[Family, ...], ...] = (
    (misplaced.forms, misplaced.stray, non_finite.unexpected),
    (
        tensor_parallel.tp_parts,
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
        misplaced.tensors_exchanged,
        operands.transposed,
        misplaced.moved,
        tails.k_tail,
        tails.n_tail,
    ),
    (rounding.types,),
    (operands.rolled, operands.substituted),
    (routing.where_it_is,),
)
FITS = 0.5  # a hypothesis that explains less than half of the error is none
_TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")
SURE = 0.95  # a hypothesis that explains this much needs no further calls
_EQUAL = 1.1  # two hypotheses that leave the same error within a tenth fit equally well
_LARGE = 1 << 23  # base weights of active experts (elements) above which a subset of the experts is looked at


@dataclass
class Diagnosis:
    """What was found about one case; `findings` best first, only those that fit."""

    case: Case
    failing: tuple[str, ...]
    findings: list[Finding] = field(default_factory=list)
    tried: int = 0
    note: str = ""

    @property
    def first(self) -> Finding | None:
        return self.findings[0] if self.findings else None

    @property
    def line(self) -> str:
        """One line: the first cause with its evidence; that none fits; or that there is nothing to explain."""
        if self.first is not None:
            return f"cause: {self.first.line}"
        if not self.failing:
            return "nothing to explain"
        return f"cause: none of {self.tried} hypotheses fits ({', '.join(self.failing)})"


def explain(situation: Situation) -> Diagnosis:
    """The hypotheses about the tensors of one case alone; no call of the engine."""
    found: list[Finding] = []
    if situation.failing:
        with one_thread():
            for families in FAMILIES:
                for family in families:
                    found += list(family(situation))
                if any(finding.complete and finding.share > 0.9 for finding in found):
                    break
    return Diagnosis(situation.case, situation.failing, ranked(found), len(found))


def ranked(found: Sequence[Finding]) -> list[Finding]:
    """Those that explain at least FITS, best first: by the error that they leave; what fits as well as the best but is
    simpler comes before it."""
    fitting = [finding for finding in found if finding.share >= FITS]
    order: list[Finding] = []
    while fitting:
        least = min(finding.left for finding in fitting)
        equal = [finding for finding in fitting if finding.left <= _EQUAL * max(least, 0.0) + 0.05]
        best = min(equal, key=lambda finding: (finding.rank, finding.left))
        order.append(best)
        fitting.remove(best)
    return order


def diagnose(
    case: Case,
    engine: str | EngineFactory,
    *,
    isa: str | None = None,
    tp: int = 1,
    threads: int | None = None,
    tensors: Sequence[str] | None = None,
    inputs: Inputs | None = None,
    actual: Tensors | None = None,
    behaviour: bool = True,
    seconds: float = 20.0,
) -> Diagnosis:
    """What is wrong with `engine` on `case`: the tensors first; where they are right, the behaviour (further calls).

    tensors: look at these only. actual: ALL_TENSORS where the caller has them already. behaviour=False makes no calls
    beyond the case's own. seconds: after which no further hypothesis is begun. What the engine raises comes through.
    """
    from ktverify.diagnose import behaviour as probes

    factory = registry.find(engine) if isinstance(engine, str) else engine
    probe = Probe(factory, isa, tp, threads, registry.strict(engine))
    inputs = make_inputs(case) if inputs is None else inputs
    inputs, note = reduced(inputs)
    if actual is None or note:
        # an engine that writes to its inputs must not make itself right
        given = replace(inputs, **{name: getattr(inputs, name).clone() for name in _TOKENS})
        actual = probe.run(case, given)
    wanted = tensors or ALL_TENSORS
    chosen = {name: tensor for name, tensor in actual.items() if name in wanted}
    situation = Situation.of(case, inputs, chosen, probe=probe, seconds=seconds)
    diagnosis = explain(situation)
    diagnosis.note = note
    first = diagnosis.first
    if behaviour and not (first is not None and first.share > SURE):
        extra, tried = probes.examine(situation, probe)
        diagnosis.tried += tried
        kinds = len(probes.REMEDIES if situation.failing else probes.PROBES)
        if tried < kinds and not extra:
            late = f"the time was up after {tried} of {kinds} kinds of call"
            diagnosis.note = f"{diagnosis.note}; {late}" if diagnosis.note else late
        diagnosis.findings = ranked([*diagnosis.findings, *extra])
    return diagnosis


def reduced(inputs: Inputs) -> tuple[Inputs, str]:
    """Large cases: the same inputs with only some experts, and what to say about it; small ones as they are.

    Ids of the other experts become -1, so that the engine is asked for these alone.
    """
    each = 3 * inputs.case.hidden * inputs.case.intermediate
    keep = max(2, _LARGE // each)
    if len(inputs.active) <= keep or len(inputs.active) * each <= _LARGE:
        return inputs, ""
    chosen = inputs.active[: keep - 1] + inputs.active[-1:]
    mine = torch.isin(inputs.expert_ids, torch.tensor(chosen))
    ids = torch.where(mine, inputs.expert_ids, torch.full_like(inputs.expert_ids, -1))
    note = f"looked at experts {', '.join(map(str, chosen))} of {len(inputs.active)}; the other ids are -1"
    return replace(inputs, expert_ids=ids, active=chosen), note


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The tensors here are small: waking torch's threads for each would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
