"""What the probes work with: a case, its inputs and the engine, and what a probe that found something says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose import calls
from ktverify.diagnose.evidence import Finding, Probe, Situation
from ktverify.engines.run import build_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs

TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")
# small enough for a hundred calls; H and I are no whole blocks of 32, I has the degrees 2, 4, 5, T is above 32
BEHAVIOUR = Case.parse("E=6,k=2,H=72,I=40,T=40,r=8,alpha=16")


@dataclass
class Stand:
    """A case that the engine is asked about, and how to ask."""

    case: Case
    inputs: Inputs
    probe: Probe

    @classmethod
    def of(cls, probe: Probe, case: Case = BEHAVIOUR) -> Stand:
        return cls(case, make_inputs(case), probe)

    def layer(self, inputs: Inputs | None = None, **more: Any) -> Any:
        """A loaded layer; LoRA and base weights are those of `inputs`."""
        given = {"isa": self.probe.isa, "tp": self.probe.tp, "threads": self.probe.threads, **more}
        return build_layer(self.probe.factory, self.case, inputs or self.inputs, **given)

    def run(self, layer: Any = None, inputs: Inputs | None = None, **more: Any) -> dict[str, Tensor]:
        """Copies of ALL_TENSORS of one forward and backward; of a new layer where none is given."""
        inputs = inputs or self.inputs
        return calls.run(self.layer(inputs, **more) if layer is None else layer, inputs)

    def situation(self, inputs: Inputs, found: dict[str, Tensor]) -> Situation:
        return Situation.of(self.case, inputs, found, probe=self.probe)

    def others(self, seed: int) -> Inputs:
        """The same layer with tokens of another seed."""
        drawn = make_inputs(self.case.with_seed(self.case.seed + seed))
        return with_tokens(self.inputs, lambda name: getattr(drawn, name))


def with_tokens(inputs: Inputs, make: Callable[[str], Tensor]) -> Inputs:
    """`inputs` with other hidden_states, expert_ids, weights and grad_output, each made from its name."""
    tensors: dict[str, Any] = {name: make(name) for name in TOKENS}
    return replace(inputs, **tensors)


def certain(cause: Cause, text: str, *evidence: str, rank: int = 1) -> Finding:
    """What a call has shown; there is nothing to fit."""
    return Finding(cause, text, 1.0, -1.0, complete=True, rank=rank, evidence=evidence)
