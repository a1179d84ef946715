"""A problem, with its right answer, and an engine's result.

Expected values are the committed goldens where they fit, else the fp64 oracle, computed here and now.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ktverify.engines.run import METHOD
from ktverify.judge import golden, reference
from ktverify.judge.metrics import Difference, compare
from ktverify.judge.rounding import RoundingError, rounding_errors
from ktverify.runs.record import AccuracyRecord
from ktverify.spec.cases import Case, catalogue
from ktverify.spec.inputs import Inputs, inputs_sha256, make_inputs


class Expected(Protocol):
    """The right answer. rounding: what errors of rounding do to it, by name of the tensor."""

    @property
    def rounding(self) -> dict[str, RoundingError]: ...
    def compare(self, name: str, actual: torch.Tensor) -> Difference: ...


@dataclass
class LiveOracle:
    """The fp64 oracle's tensors by name, as `spec.names` lists them, and their errors of rounding."""

    tensors: dict[str, torch.Tensor]
    rounding: dict[str, RoundingError]

    @classmethod
    def of(cls, inputs: Inputs, *, skip_lora: bool = False, backward: bool = True) -> LiveOracle:
        """Compute both for `inputs`, of output alone without backward.

        The errors always have LoRA: without it they would hardly differ.
        """
        tensors = reference.forward_backward(inputs, skip_lora=skip_lora, backward=backward)
        return cls(tensors, rounding_errors(inputs, backward=backward))

    def compare(self, name: str, actual: torch.Tensor) -> Difference:
        return compare(actual, self.tensors[name])


_KEPT = 48  # small cases: a few hundred MB at most
_known: OrderedDict[str, LiveOracle] = OrderedDict()


def live_oracle(inputs: Inputs) -> LiveOracle:
    """The oracle of `inputs`, found again by their bytes: all engines and TP degrees of a process share it."""
    key = f"{inputs.case.spec} {inputs_sha256(inputs)}"
    if key not in _known:
        _known[key] = LiveOracle.of(inputs)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    _known.move_to_end(key)
    return _known[key]


@dataclass(frozen=True)
class Problem:
    """A case with its inputs and its right answer. source: where `expected` is from, "golden" or "fresh"."""

    case: Case
    inputs: Inputs
    expected: Expected
    source: str

    @classmethod
    def of(cls, case: Case, *, fresh: bool = False, method: str = METHOD, backward: bool = True) -> Problem:
        """The problem of `case`: with its golden unless `fresh` or another method asks for the live oracle.

        backward: False where only its output is to be judged, which saves the live oracle more than half of its time.

        ValueError where a golden is there but belongs to other inputs.
        """
        inputs, source = make_inputs(case), source_of(case, fresh=fresh, method=method)
        if source == "fresh":
            return cls(case, inputs, LiveOracle.of(inputs, skip_lora=method != METHOD, backward=backward), source)
        kept = golden.load(case)
        if kept.inputs_sha256 != inputs_sha256(inputs):
            raise ValueError(
                f"the golden of {case.id} is of other inputs than this generator makes; "
                "run `python -m ktverify.golden regenerate`, or compare with --fresh"
            )
        return cls(case, inputs, kept, source)


@dataclass
class Result:
    """What an engine gave for a problem: its tensors by name, and a record for each that was judged. tp: the tensor
    parallel degree of the call."""

    problem: Problem
    actual: dict[str, torch.Tensor] = field(default_factory=dict)
    records: list[AccuracyRecord] = field(default_factory=list)
    tp: int = 1

    @property
    def passed(self) -> bool:
        """True where something was judged and everything passed."""
        return bool(self.records) and all(record.verdict == "PASS" for record in self.records)


def source_of(case: Case, *, fresh: bool, method: str = METHOD) -> str:
    """Where the right answer comes from: "golden" for an unchanged row of the catalogue that has one, else "fresh"."""
    in_catalogue = not fresh and method == METHOD and catalogue().get(case.name) == case
    return "golden" if in_catalogue and golden.has(case) else "fresh"
