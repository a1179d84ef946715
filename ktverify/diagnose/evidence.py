"""What a hypothesis is tried on: an engine's tensors beside the right ones, and how much of the error is explained.

The error is measured in budgets: per tensor (||actual - right|| / (budget ||right||))^2, added up, so that every
tensor counts as far as it is over what plain bf16 would be allowed. A prediction explains
1 - error(prediction) / error(right).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.formulas import Change, Layer, Values, reached_tensors, recomputed
from ktverify.engines.registry import EngineFactory
from ktverify.engines.run import run_case
from ktverify.judge import gates, metrics
from ktverify.judge.bf16_baseline import peer_error
from ktverify.judge.metrics import Difference
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, inputs_sha256
from ktverify.spec.names import ALL_TENSORS, GRAD_NAMES, GRAD_WEIGHTS, TOKEN_TENSORS, tensor_shapes

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Finding:
    """One hypothesis that was tried. share: of the error, 1 is all; left: what of it stays, in budgets.

    complete: no tensor is over its budget any more. rank: 1 for what is said in one word, 2 for an exchange that was
    searched for, 3 for a fit of many numbers, 4 for what only narrows the search; among equals the lowest comes first.
    """

    cause: Cause
    text: str
    share: float
    left: float = 0.0
    complete: bool = False
    rank: int = 1
    evidence: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """`LoRA scaling: found 1.0, expected alpha / rank = 2.0 (explains 99.8 % of the error)`."""
        return f"{self.text} (explains {100 * self.share:.1f} % of the error)" if self.left >= 0 else self.text


@dataclass(frozen=True)
class Probe:
    """How to call the engine again: None where only its tensors are there."""

    factory: EngineFactory
    isa: str | None = None
    tp: int = 1
    threads: int | None = None
    strict: bool = False

    def run(self, case: Case, inputs: Inputs, **more: Any) -> dict[str, Tensor]:
        """ALL_TENSORS of a new layer; `more` overrides tp, threads and constructor arguments."""
        found = run_case(
            self.factory, case, inputs=inputs, **{"isa": self.isa, "tp": self.tp, "threads": self.threads, **more}
        )
        return {name: tensor.clone() for name, tensor in found.items()}


_peers: dict[str, dict[str, float]] = {}


def _peer_of(inputs: Inputs, right: dict[str, Tensor]) -> dict[str, float]:
    """The plain bf16 peer's error; kept, for a search asks for the same few inputs again and again."""
    key = inputs_sha256(inputs)
    if key not in _peers:
        if len(_peers) > 64:
            _peers.clear()
        _peers[key] = peer_error(inputs, right)
    return _peers[key]


def wrong_forms(case: Case, actual: Tensors) -> dict[str, str]:
    """By name, which tensors have another shape or dtype than docs/contract.md, "The layer", says."""
    shapes = tensor_shapes(case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank)
    wrong = {}
    for name, tensor in actual.items():
        dtype = getattr(torch, case.lora_dtype) if name in GRAD_NAMES else torch.bfloat16
        dtype = torch.float32 if name == GRAD_WEIGHTS else dtype
        if tuple(tensor.shape) != shapes[name]:
            wrong[name] = f"{name} is {list(tensor.shape)}, expected {list(shapes[name])}"
        elif tensor.dtype != dtype:
            words = [str(each).removeprefix("torch.") for each in (tensor.dtype, dtype)]
            wrong[name] = f"{name} is {words[0]}, expected {words[1]}"
    return wrong


@dataclass
class Situation:
    """An engine's tensors of one case, the oracle's, and the budgets; tensors as ktverify.names lists them."""

    case: Case
    inputs: Inputs
    actual: dict[str, Tensor]
    layer: Layer
    budgets: dict[str, float]
    differences: dict[str, Difference]
    failing: tuple[str, ...]
    deadline: float
    dtypes: dict[str, torch.dtype]
    probe: Probe | None = None
    weights: dict[str, float] = field(default_factory=dict)
    finite: dict[str, Tensor | None] = field(default_factory=dict)
    forms: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        case: Case,
        inputs: Inputs,
        actual: Tensors,
        *,
        probe: Probe | None = None,
        seconds: float = 20.0,
        peer: Mapping[str, float] | None = None,
    ) -> Situation:
        """The oracle, the budgets of `gates` and the verdict on each of the tensors in `actual`."""
        layer = Layer.of(inputs)
        right = layer.tensors
        peer = _peer_of(inputs, right) if peer is None else peer
        found: dict[str, Difference] = {}
        budgets: dict[str, float] = {}
        failing = []
        forms = wrong_forms(case, actual)
        strict = probe is not None and probe.strict
        for name in (name for name in ALL_TENSORS if name in actual):
            if actual[name].shape != right[name].shape:
                failing.append(name)
                continue
            found[name] = metrics.compare(actual[name], right[name])
            deciding = gates.numbers_deciding(case, name, found[name].nonzero)
            budgets[name] = gates.peer_budget(peer[name], deciding)
            judged = gates.judge(
                case, name, found[name], peer[name], own_engine=strict, isa=(probe.isa if probe else None) or ""
            )
            inexact = case.exact and found[name].mismatched != 0
            if judged.verdict is gates.Verdict.FAIL or name in forms or inexact:
                failing.append(name)
        situation = cls(
            case=case,
            inputs=inputs,
            actual={name: actual[name].detach().double() for name in found},
            layer=layer,
            budgets=budgets,
            differences=found,
            failing=tuple(failing),
            deadline=time.monotonic() + seconds,
            probe=probe,
            dtypes={name: actual[name].dtype for name in found},
            forms=tuple(forms.values()),
        )
        situation._weigh()
        return situation

    def _weigh(self) -> None:
        for name, difference in self.differences.items():
            norm = difference.norm_expected or difference.norm_actual or 1.0
            self.weights[name] = 1.0 / (self.budgets[name] * norm) ** 2
            both = torch.isfinite(self.actual[name]) & torch.isfinite(self.right[name])
            self.finite[name] = None if bool(both.all()) else both

    @property
    def right(self) -> dict[str, Tensor]:
        return self.layer.tensors

    def off(self, name: str, predicted: Tensor) -> float:
        """The error of one tensor that `predicted` leaves, in squared budgets, over what is finite in both."""
        # an engine rounds its result once; so is what it is compared with
        apart = self.actual[name] - predicted.to(self.dtypes[name]).double()
        finite = self.finite[name]
        if finite is not None:
            apart = torch.where(finite & torch.isfinite(predicted), apart, 0.0)
        return float(apart.square().sum()) * self.weights[name]

    @functools.cached_property
    def errors(self) -> dict[str, float]:
        """The error of each tensor as it is, in squared budgets."""
        return {name: self.off(name, self.right[name]) for name in self.actual}

    @functools.cached_property
    def error(self) -> float:
        return sum(self.errors.values())

    def reachable(self, names: Sequence[str] | frozenset[str]) -> float:
        """The share of the error that stands in these tensors: no change of them can explain more."""
        return sum(self.errors.get(name, 0.0) for name in names) / self.error if self.error else 0.0

    def left(self, predicted: Tensors) -> dict[str, float]:
        """The error that is left of each tensor; those that `predicted` has not keep theirs."""
        return {
            name: self.off(name, predicted[name]) if name in predicted else error for name, error in self.errors.items()
        }

    def finding(
        self, cause: Cause, text: str, predicted: Tensors, *, rank: int = 1, evidence: tuple[str, ...] = ()
    ) -> Finding:
        """How well `predicted` fits."""
        left = self.left(predicted)
        total = sum(left.values())
        return Finding(
            cause=cause,
            text=text,
            share=1 - total / self.error if self.error else 0.0,
            left=total,
            complete=all(value <= 1.0 for value in left.values()),
            rank=rank,
            evidence=evidence,
        )

    def worth(self, names: Sequence[str] | frozenset[str], least: float = 0.5) -> bool:
        """False where a change that reaches only these tensors cannot explain the error, or the time is up."""
        return self.reachable(names) >= least and time.monotonic() < self.deadline

    def tried(
        self, cause: Cause, text: str, change: Change, *, rank: int = 1, evidence: tuple[str, ...] = ()
    ) -> Iterator[Finding]:
        """The finding of a changed formula; nothing where it cannot be what is wrong."""
        if self.worth(reached_tensors(change)) and self._gains(change):
            yield self.finding(cause, text, self.layer.changed(change), rank=rank, evidence=evidence)

    @functools.cached_property
    def _busiest(self) -> Values | None:
        return max(self.layer.experts, key=lambda v: len(v.rows), default=None)

    def _gains(self, change: Change) -> bool:
        """False where `change`, tried on the busiest expert alone, takes its rows and gradients further off.

        With d what the change moves, ||actual - right||^2 falls by 2 <actual - right, d> - ||d||^2. Most hypotheses end
        here, at the cost of one expert.
        """
        v = self._busiest
        if v is None:
            return True
        here, gain, moves = recomputed(v, change), 0.0, False
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
        """(factor, tensors) for which a change with one free number fits best: Gauss-Newton on the error in budgets.

        None where the change cannot be what is wrong, or moves nothing.
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

    def fit(self, parts: Sequence[Tensors]) -> Tensor | None:
        """[len(parts)] coefficients: actual - right as a sum of `parts`, by least squares in budgets."""
        return self._solve(parts, {name: self.actual[name] - self.right[name] for name in self.actual})

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
