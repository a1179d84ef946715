"""The error of an engine's tensors, and how much of it a hypothesis explains.

The error is measured in budgets: the sum over tensors of (||actual - right|| / (budget ||right||))^2. The budget of a
tensor is what every engine is allowed, so each tensor counts by how far it is over that. A prediction, the
tensors that an engine with some defect would return, explains the share 1 - error(prediction) / error(right).
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.judging import wrong_forms
from ktverify.checks.problem import live_oracle
from ktverify.checks.target import Target
from ktverify.diagnose.formulas import Change, LayerValues, reached_tensors, recomputed
from ktverify.judge import gates, metrics
from ktverify.judge.metrics import Difference
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_WEIGHTS, TOKEN_TENSORS

Tensors = Mapping[str, Tensor]
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
NEAR = 0.03  # a fitted factor this near to 1 counts as 1


@dataclass(frozen=True)
class Explanation:
    """A tested hypothesis, or what a call or a check found.

    share: of the error that it explains; 1 is all. left: the error that stays, in budgets; negative where nothing was
    fitted. complete: every tensor is within its budget then. rank: 1 a plain statement, 2 the result of a search, 3 a
    fit of several numbers, 4 a hint only; of explanations that fit equally well the lowest rank comes first.
    tensors: those that it explains, where it does not explain all. family: the function that tests the hypothesis.
    proof: what a further call showed, "" for none; only that makes a cause certain. also: checks that show the same.
    """

    cause: Cause
    text: str
    share: float
    left: float = 0.0
    complete: bool = False
    rank: int = 1
    details: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    family: Callable[[Evidence], Iterator[Explanation]] | None = None
    proof: str = ""
    also: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """`LoRA scaling: found 1.0, expected alpha / rank = 2.0 (explains 99.8 % of the error)`."""
        of = f"the error of {', '.join(self.tensors)}" if self.tensors else "the error"
        return f"{self.text} (explains {100 * self.share:.1f} % of {of})" if self.left >= 0 else self.text

    @property
    def level(self) -> str:
        """certain: a call proved it; likely: it explains all that is wrong, or a check says so; else possible."""
        return "certain" if self.proof else "likely" if self.complete else "possible"

    def says(self, other: Explanation) -> bool:
        """True for the same cause in the same words, where numbers may differ as those of two fits do."""
        if self.cause is not other.cause or not same_words(self.text, other.text):
            return False
        pairs = zip(_NUMBER.findall(self.text), _NUMBER.findall(other.text), strict=True)
        return all(abs(float(a) - float(b)) <= NEAR * abs(float(a)) for a, b in pairs)


def same_words(text: str, other: str) -> bool:
    """True for texts that differ in numbers only."""
    return _NUMBER.sub("", text) == _NUMBER.sub("", other)


def stated(cause: Cause, text: str, *details: str, rank: int = 1, proof: str = "") -> Explanation:
    """What a call or a single tensor shows without a fit."""
    return Explanation(cause, text, 1.0, -1.0, complete=True, rank=rank, details=details, proof=proof)


def _on_cpu(tensor: Tensor) -> bool:
    """True for a tensor whose elements can be compared here; others have a wrong form and no more."""
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _norm(tensor: Tensor) -> float:
    """The 2-norm of the finite elements; a number above 0 for a tensor of zeros."""
    return float(torch.nan_to_num(tensor, 0.0, 0.0, 0.0).norm()) or 1e-300


@dataclass
class Evidence:
    """The tensors of one call beside the oracle's, the budgets, and methods that test hypotheses on them.

    actual: fp64, by name; dtypes: what they were. failing: the tensors that do not pass; forms: those of a wrong shape
    or dtype, in words. tp: the tensor parallel degree of the call. deadline: a time of time.process_time.
    """

    inputs: Inputs
    actual: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    layer: LayerValues
    budgets: dict[str, float]
    differences: dict[str, Difference]
    failing: tuple[str, ...]
    forms: tuple[str, ...]
    tp: int
    deadline: float
    # of the last explanation
    predicted: Tensors = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        actual: Tensors,
        target: Target | None = None,
        *,
        strict: bool | None = None,
        seconds: float = 20.0,
    ) -> Evidence:
        """Compare `actual`, some of ALL_TENSORS, with the oracle of `inputs`, by the gates.

        target: the engine that returned them; its tensor parallel degree and its strictness matter. strict: that
        strictness, where the caller knows it; the engine is imported otherwise. seconds: of processor time, after
        which no further hypothesis is tested. Wall time would make the cause depend on what else the machine does.
        """
        case, layer = inputs.case, LayerValues.of(inputs)
        rounding, forms = live_oracle(inputs).rounding, wrong_forms(inputs.case, actual)
        found: dict[str, Difference] = {}
        budgets: dict[str, float] = {}
        failing = []
        isa = (target.isa or "") if target is not None else ""
        if strict is None:
            strict = target is not None and target.strict
        for name in (name for name in ALL_TENSORS if name in actual):
            right = layer.tensors[name]
            if actual[name].shape != right.shape or not _on_cpu(actual[name]):
                failing.append(name)
                continue
            found[name] = metrics.compare(actual[name], right)
            budgets[name] = gates.budget(rounding[name])
            judged = gates.judge(case, name, found[name], rounding[name], own_engine=strict, isa=isa)
            inexact = case.exact and found[name].mismatched != 0
            if judged.verdict is gates.Verdict.FAIL or name in forms or inexact:
                failing.append(name)
        return cls(
            inputs=inputs,
            actual={name: actual[name].detach().double() for name in found},
            dtypes={name: actual[name].dtype for name in found},
            layer=layer,
            budgets=budgets,
            differences=found,
            failing=tuple(failing),
            forms=tuple(forms.values()),
            tp=target.tp if target is not None else 1,
            deadline=time.process_time() + seconds,
        )

    @property
    def case(self) -> Case:
        return self.inputs.case

    @functools.cached_property
    def weights(self) -> dict[str, float]:
        """By tensor, the factor that turns a squared error into squared budgets."""
        norms = {name: found.norm_expected or found.norm_actual or 1.0 for name, found in self.differences.items()}
        # beside a defect, the values with that defect are what the engine rounds
        here = {name: max(norm, _norm(self.right[name])) for name, norm in norms.items()}
        return {name: 1.0 / (self.budgets[name] * norm) ** 2 for name, norm in here.items()}

    @functools.cached_property
    def finite(self) -> dict[str, Tensor | None]:
        """By tensor, the elements that are finite in both; None where all are."""
        both = {name: torch.isfinite(value) & torch.isfinite(self.right[name]) for name, value in self.actual.items()}
        return {name: None if bool(mask.all()) else mask for name, mask in both.items()}

    @property
    def right(self) -> dict[str, Tensor]:
        """The oracle's tensors, fp64."""
        return self.layer.tensors

    def off(self, name: str, predicted: Tensor) -> float:
        """The error of one tensor against `predicted`, in squared budgets, over elements that are finite in both."""
        # the prediction is rounded once to the dtype of the result, as an engine rounds it
        apart = self.actual[name] - predicted.to(self.dtypes[name]).double()
        finite = self.finite[name]
        if finite is not None:
            apart = torch.where(finite & torch.isfinite(predicted), apart, 0.0)
        return float(apart.square().sum()) * self.weights[name]

    @functools.cached_property
    def errors(self) -> dict[str, float]:
        """The error of each tensor against the oracle, in squared budgets."""
        return {name: self.off(name, self.right[name]) for name in self.actual}

    @functools.cached_property
    def error(self) -> float:
        """The sum of `errors`."""
        return sum(self.errors.values())

    def left(self, predicted: Tensors) -> dict[str, float]:
        """The error of each tensor against `predicted`; against the oracle where `predicted` does not have it."""
        changed = {name: self.off(name, predicted[name]) for name in self.errors if name in predicted}
        return {**self.errors, **changed}

    def over(self, left: Mapping[str, float], predicted: Tensors) -> list[str]:
        """The tensors that `predicted` leaves out of their budgets. left: what it leaves of each.

        A defect that makes a tensor three times as large makes its roundings three times as large too.
        """
        right = {name: _norm(self.right[name]) for name in left if name in predicted and self.right[name].any()}
        grown = {name: _norm(predicted[name]) / norm for name, norm in right.items()}
        return [name for name, error in left.items() if not math.sqrt(error) <= max(1.0, grown.get(name, 1.0))]

    def only(self, name: str) -> Evidence:
        """The evidence of one tensor alone."""
        return replace(self, actual={name: self.actual[name]}, failing=(name,))

    def under(self, predicted: Tensors) -> Evidence:
        """What is still wrong beside the defect that predicts these tensors, its last prediction."""
        found = replace(self, layer=self.layer.under(predicted))
        wrong = tuple(name for name, error in found.errors.items() if error > 1.0)
        return replace(found, failing=wrong)

    def explanation(
        self, cause: Cause, text: str, predicted: Tensors, *, rank: int = 1, details: tuple[str, ...] = ()
    ) -> Explanation:
        """How much of the error an engine explains that returns `predicted`."""
        left = self.left(predicted)
        self.predicted = predicted
        total = sum(left.values())
        share = 1 - total / self.error if self.error else 0.0
        return Explanation(cause, text, share, total, not self.over(left, predicted), rank, details)

    def worth(self, names: Sequence[str] | frozenset[str], least: float = 0.5) -> bool:
        """False where a change of only these tensors cannot explain `least` of the error, or the time is up."""
        reachable = sum(self.errors.get(name, 0.0) for name in names) / self.error if self.error else 0.0
        return reachable >= least and time.process_time() < self.deadline

    def test(self, cause: Cause, text: str, change: Change, *, rank: int = 1) -> Iterator[Explanation]:
        """The explanation by a layer with other formulas; nothing where that cannot lower the error."""
        if self.worth(reached_tensors(change)) and self._gains(change):
            yield self.explanation(cause, text, self.layer.changed(change), rank=rank)

    def _gains(self, change: Change) -> bool:
        """False where `change`, evaluated for the busiest expert only, increases the error of its rows and gradients.

        With d the difference that the change makes, ||actual - right||^2 falls by 2 <actual - right, d> - ||d||^2.
        This rejects most hypotheses at the cost of one expert.
        """
        if not self.layer.experts:
            return True
        v = max(self.layer.experts, key=lambda each: len(each.rows))
        here, gain, moves = recomputed(v, change, self.layer.formulas), 0.0, False
        for name in reached_tensors(change).intersection(self.errors):
            moved = here[name] - v[name]
            if name in TOKEN_TENSORS:
                at: tuple[Tensor, ...] = (v.rows, v.slots) if name == GRAD_WEIGHTS else (v.rows,)
                apart = self.actual[name][at] - self.right[name][at]
            else:
                apart = self.actual[name][v.expert] - self.right[name][v.expert]
            fine = torch.isfinite(apart) & torch.isfinite(moved)
            apart, moved = torch.where(fine, apart, 0.0), torch.where(fine, moved, 0.0)
            moves = moves or bool(moved.any())
            gain += self.weights[name] * float((2 * apart * moved - moved.square()).sum())
        return gain > 0 or not moves

    # ---- fits

    def fit_factor(self, change: Callable[[float], Change], start: float = 1.0) -> tuple[float, Tensors] | None:
        """(factor, tensors) of the best fit of a change with one free number, by Gauss-Newton on the error in budgets.

        None where the change cannot explain the error, or has no effect.
        """
        if not self.worth(reached_tensors(change(start))):
            return None
        factor, here = start, self.layer.changed(change(start))
        for _ in range(8):
            step = 1e-4 * max(1.0, abs(factor))
            beside = self.layer.changed(change(factor + step))
            slope = {name: (beside[name] - here[name]) / step for name in here}
            moved = self._solve([slope], {name: self.actual[name] - here[name] for name in here if name in self.actual})
            if moved is None:
                return None
            factor += float(moved[0])
            here = self.layer.changed(change(factor))
            if abs(float(moved[0])) < 1e-4 * max(1.0, abs(factor)):
                break
        return factor, here

    def fit_shares(
        self, parts: Sequence[Tensors], names: Sequence[str]
    ) -> tuple[dict[int, float], dict[str, Tensor]] | None:
        """(factors, tensors) of the best fit where the tensors `names` are the sum of `parts`, each with a factor.

        factors: by index of the part, only those that are not 1. None where the change cannot explain the error.
        """
        chosen = [{name: part[name] for name in names if name in part} for part in parts]
        if not chosen or not chosen[0] or not self.worth(names):
            return None
        moved = self._solve(chosen, {name: self.actual[name] - self.right[name] for name in self.actual})
        odd = {i: v for i, v in enumerate(moved.tolist()) if abs(v) > NEAR} if moved is not None else {}
        if not odd:
            return None
        change = {name: torch.stack([v * chosen[i][name] for i, v in odd.items()]).sum(0) for name in chosen[0]}
        return {i: 1 + v for i, v in odd.items()}, {name: self.right[name] + moved for name, moved in change.items()}

    def _solve(self, parts: Sequence[Tensors], apart: Tensors) -> Tensor | None:
        size = len(parts)
        normal, beside = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for name, target in apart.items():
            rows = [part[name].reshape(-1) if name in part else torch.zeros(target.numel()).double() for part in parts]
            columns = torch.stack(rows)
            keep = torch.isfinite(columns).all(0) & torch.isfinite(target.reshape(-1))
            columns, wanted = columns[:, keep], target.reshape(-1)[keep]
            normal += self.weights[name] * (columns @ columns.T)
            beside += self.weights[name] * (columns @ wanted)
        if not bool(torch.isfinite(normal).all()) or float(normal.abs().max()) == 0:
            return None
        small = 1e-12 * float(normal.diagonal().max())
        solved: Tensor = torch.linalg.solve(normal + small * torch.eye(size, dtype=torch.float64), beside)
        return solved
