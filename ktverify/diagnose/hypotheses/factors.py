"""Hypotheses of a constant factor: the scale of LoRA, a part left out or counted twice, routing weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.diagnose.formulas import FORMULAS, LABELS, Change, Formula, Values, exchanged, label, operands
from ktverify.spec.names import GRAD_NAMES, GRAD_WEIGHTS, OUTPUT

_SCALED = tuple(stage for stage in FORMULAS if "s" in operands(stage))
_FORWARD = ("g_lora", "u_lora", "y_lora")
_BACKWARD = tuple(stage for stage in _SCALED if stage not in _FORWARD)
_THROUGH = ("dh_lora", "dx_gate_lora", "dx_up_lora")

# where the scale s is used wrongly -> the stages that use it there
LORA_SITES: dict[str, tuple[str, ...]] = {
    "LoRA scaling": _SCALED,
    "LoRA scaling in the forward": _FORWARD,
    "LoRA scaling in the backward": _BACKWARD,
    "LoRA scaling in the six LoRA gradients": GRAD_NAMES,
    "LoRA scaling in the gradients of A": tuple(name for name in GRAD_NAMES if name.endswith("_a")),
    "LoRA scaling in the gradients of B": tuple(name for name in GRAD_NAMES if name.endswith("_b")),
    "LoRA scaling in what grad_input and dh get": _THROUGH,
    "LoRA scaling in the LoRA part of grad_input": _THROUGH[1:],
    "LoRA scaling of gate": ("g_lora", "dx_gate_lora", "grad_gate_lora_a", "grad_gate_lora_b"),
    "LoRA scaling of up": ("u_lora", "dx_up_lora", "grad_up_lora_a", "grad_up_lora_b"),
    "LoRA scaling of down": ("y_lora", "dh_lora", "grad_down_lora_a", "grad_down_lora_b"),
    **{f"LoRA scaling in {label(stage)}": (stage,) for stage in _SCALED},
}


def lora_scale(situation: Situation) -> Iterator[Finding]:
    """Another s than alpha / rank, everywhere or in some places; found by least squares."""
    case = situation.case
    for text, stages in LORA_SITES.items():
        fitted = situation.fit_factor(lambda factor, stages=stages: _scaled(stages, factor))  # type: ignore[misc]
        if fitted is None:
            continue
        factor, predicted = fitted
        found = case.scaling * factor
        said = f"{text}: found {_short(found)}{_named(found, case.alpha, case.rank)}, "
        said += f"expected alpha / rank = {_short(case.scaling)}"
        cause = Cause.LORA_SCALE
        if stages[0] in LABELS and len(stages) == 1 and abs(factor) < 0.01:
            cause, said = Cause.WRONG_PROJECTION, f"{label(stages[0])} is missing"
        yield situation.finding(cause, said, predicted, rank=1 if len(stages) > 1 else 2)


def _scaled(stages: tuple[str, ...], factor: float) -> Change:
    return {stage: exchanged(stage, s=lambda v: factor * v["s"]) for stage in stages}


def _named(found: float, alpha: float, rank: int) -> str:
    """What a number could be, made of alpha and rank."""
    for text, value in (
        ("none", 0.0),
        ("1", 1.0),
        ("alpha", alpha),
        ("rank", float(rank)),
        ("1 / rank", 1 / rank),
        ("alpha / sqrt(rank)", alpha / math.sqrt(rank)),
        ("rank / alpha", rank / alpha),
        ("(alpha / rank)^2", (alpha / rank) ** 2),
    ):
        if abs(found - value) < 0.01 * max(abs(value), 0.05) and abs(alpha / rank - value) > 0.02 * abs(value):
            return f" ({text})" if text not in ("1",) else ""
    return ""


def stage_factors(situation: Situation) -> Iterator[Finding]:
    """One stage has a constant factor that it should not have: 0 where it was left out, 2 where it was added twice."""
    for stage in FORMULAS:
        if stage in _SCALED or stage in ("sigma",):
            continue
        fitted = situation.fit_factor(lambda factor, stage=stage: {stage: _times(stage, factor)})  # type: ignore[misc]
        if fitted is None:
            continue
        factor, predicted = fitted
        if stage == "h" and abs(factor) < 1e-3:
            continue
        said = f"{label(stage)} is missing" if abs(factor) < 0.01 else f"{label(stage)} has the factor {_short(factor)}"
        yield situation.finding(_cause_of_factor(stage), said, predicted)


def _times(stage: str, factor: float) -> Formula:
    return lambda v: factor * FORMULAS[stage](v)


def _cause_of_factor(stage: str) -> Cause:
    if stage in ("dy", OUTPUT, GRAD_WEIGHTS):
        return Cause.ROUTING_WEIGHT
    if stage in ("dsilu", "silu"):
        return Cause.ACTIVATION
    return Cause.WRONG_PROJECTION


# ---- routing weights


def routing_weight(situation: Situation) -> Iterator[Finding]:
    """Routing weights left out, used twice, made to add up to one, rounded, or another slot's."""
    weights = situation.inputs.weights.double()
    masked = situation.inputs.expert_ids < 0
    sums = torch.where(masked, 0.0, weights).sum(1, keepdim=True)
    other: dict[str, Callable[[Tensor], Tensor]] = {
        "is left out (1 instead of w)": lambda w: torch.ones_like(w),
        "is used twice (w^2)": lambda w: w * w,
        "is made to add up to 1 a token": lambda w: w / sums,
        "is put through a softmax": lambda w: w.softmax(1),
        "is 1 / k": lambda w: torch.full_like(w, 1 / w.shape[1]),
        "is its square root": lambda w: w.sqrt(),
        "is that of slot 0": lambda w: w[:, :1].expand_as(w),
        "is that of the next slot": lambda w: w.roll(-1, 1),
        "is that of the slot before": lambda w: w.roll(1, 1),
        "is that of the next token": lambda w: w.roll(-1, 0),
        "is that of the token before": lambda w: w.roll(1, 0),
        "is the slots' in reverse order": lambda w: w.flip(1),
        "is sorted": lambda w: w.sort(1, descending=True).values,
    }
    sites: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("the routing weight", ("w",)),
        ("the routing weight in the forward", (OUTPUT,)),
        ("the routing weight in the backward", ("dy",)),
    )
    for site, stages in sites:
        for text, make in other.items():
            cause = Cause.SLOT_WRONG if "slot" in text else Cause.ROUTING_WEIGHT
            change = {stage: _with_weight(stage, make(weights)) for stage in stages}
            yield from situation.tried(cause, f"{site} {text}", change)
    yield from _weight_in_gradients(situation)
    yield from _weight_gradient(situation)


def _weight_in_gradients(situation: Situation) -> Iterator[Finding]:
    """The LoRA gradients of one projection without the weight, or with it twice."""
    for projection in ("gate", "up", "down"):
        names = [name for name in GRAD_NAMES if projection in name]
        for text, make in (
            ("is left out", lambda value, w: value / w),
            ("is used twice", lambda value, w: value * w),
        ):
            change: dict[str, Formula] = {}
            for name in names:
                rows = operands(name)[1]  # the one that comes from dy
                change[name] = exchanged(name, **{rows: lambda v, n=rows, f=make: f(v[n], v["w"])})
            said = f"the routing weight in the gradients of {projection}'s LoRA {text}"
            yield from situation.tried(Cause.ROUTING_WEIGHT, said, change)


def _with_weight(stage: str, weights: Tensor) -> Formula:
    def leaf(v: Values) -> Tensor:
        return weights[v.rows, v.slots].unsqueeze(1)

    return leaf if stage == "w" else exchanged(stage, w=leaf)


def _weight_gradient(situation: Situation) -> Iterator[Finding]:
    """dw with the weight in it, of another value, of another slot, or left out."""
    if GRAD_WEIGHTS not in situation.actual or not situation.worth((GRAD_WEIGHTS,)):
        return
    other: dict[str, Callable[[Values], Tensor]] = {
        "has the weight in it": lambda v: (v["dy"] * v["y"]).sum(1),
        "is of y without LoRA": lambda v: (v["d_out"] * v["y_base"]).sum(1),
        "is divided by the weight": lambda v: (v["d_out"] * v["y"]).sum(1) / v["w"][:, 0],
        "is a mean, not a sum": lambda v: (v["d_out"] * v["y"]).mean(1),
        "is zero": lambda v: torch.zeros_like(v["w"][:, 0]),
    }
    for text, formula in other.items():
        yield from situation.tried(Cause.ROUTING_WEIGHT, f"grad_weights {text}", {GRAD_WEIGHTS: formula})
    right, weights = situation.right[GRAD_WEIGHTS], situation.inputs.weights.double()
    through_softmax = weights * (right - (weights * right).sum(1, keepdim=True))
    for text, predicted in (
        ("has its slots shifted by one", right.roll(1, 1)),
        ("has its slots shifted back by one", right.roll(-1, 1)),
        ("has its slots in reverse order", right.flip(1)),
        ("has its tokens shifted by one", right.roll(1, 0)),
        ("has its tokens shifted back by one", right.roll(-1, 0)),
    ):
        yield situation.finding(Cause.SLOT_WRONG, f"grad_weights {text}", {GRAD_WEIGHTS: predicted})
    said = "grad_weights went through a softmax's backward"
    yield situation.finding(Cause.ROUTING_WEIGHT, said, {GRAD_WEIGHTS: through_softmax})


def _short(value: float) -> str:
    """2.0, 0.125, 3.2e-05."""
    return f"{value:.1f}" if abs(value - round(value, 1)) < 1e-2 * max(abs(value), 0.1) else f"{value:.3g}"
