"""Hypotheses of a wrong factor: LoRA scale, routing weight, a term or a TP part left out or counted twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import NEAR, Evidence, Explanation
from ktverify.diagnose.formulas import FORMULAS, LABELS, Change, ExpertValues, Formula, label, operands, with_operands
from ktverify.spec.names import BACKWARD_TENSORS, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT

_SCALED = tuple(stage for stage in FORMULAS if "s" in operands(stage))
_FORWARD = ("g_lora", "u_lora", "y_lora")
_BACKWARD = tuple(stage for stage in _SCALED if stage not in _FORWARD)
_THROUGH = ("dh_lora", "dx_gate_lora", "dx_up_lora")
# the cause of a wrong factor of a stage, where it is no WRONG_PROJECTION
_CAUSES = dict.fromkeys(("dy", OUTPUT, GRAD_WEIGHTS), Cause.ROUTING_WEIGHT)
_CAUSES |= dict.fromkeys(("dsilu", "silu"), Cause.ACTIVATION)

# name of a group of stages that use the scale s -> these stages
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


def lora_scale(evidence: Evidence) -> Iterator[Explanation]:
    """The scale is not alpha / rank in one of LORA_SITES; its value is fitted by least squares."""
    case = evidence.case
    for text, stages in LORA_SITES.items():
        fitted = evidence.fit_factor(partial(_scaled, stages))
        if fitted is None:
            continue
        factor, predicted = fitted
        found = case.scaling * factor
        said = f"{text}: found {_short(found)}{_named(found, case.alpha, case.rank)}, "
        said += f"expected alpha / rank = {_short(case.scaling)}"
        cause = Cause.LORA_SCALE
        if stages[0] in LABELS and len(stages) == 1 and abs(factor) < 0.01:
            cause, said = Cause.WRONG_PROJECTION, f"{label(stages[0])} is missing"
        yield evidence.explanation(cause, said, predicted, rank=1 if len(stages) > 1 else 2)


def _scaled(stages: tuple[str, ...], factor: float) -> Change:
    return {stage: with_operands(stage, s=lambda v: factor * v["s"]) for stage in stages}


def _named(found: float, alpha: float, rank: int) -> str:
    """A formula of alpha and rank with this value, in parentheses; "" if there is none."""
    for text, value in (
        ("none", 0.0),
        ("", 1.0),
        ("alpha", alpha),
        ("rank", float(rank)),
        ("1 / rank", 1 / rank),
        ("alpha / sqrt(rank)", alpha / math.sqrt(rank)),
        ("rank / alpha", rank / alpha),
        ("(alpha / rank)^2", (alpha / rank) ** 2),
    ):
        if abs(found - value) < 0.01 * max(abs(value), 0.05) and abs(alpha / rank - value) > 0.02 * abs(value):
            return f" ({text})" if text else ""
    return ""


def stage_factors(evidence: Evidence) -> Iterator[Explanation]:
    """One stage has a constant factor: 0 if it was left out, 2 if it was added twice."""
    for stage in FORMULAS:
        fitted = evidence.fit_factor(partial(_times, stage)) if stage not in (*_SCALED, "sigma") else None
        if fitted is None or (stage == "h" and abs(fitted[0]) < 1e-3):
            continue
        factor, predicted = fitted
        said = f"{label(stage)} is missing" if abs(factor) < 0.01 else f"{label(stage)} has the factor {_short(factor)}"
        yield evidence.explanation(_CAUSES.get(stage, Cause.WRONG_PROJECTION), said, predicted)


def _times(stage: str, factor: float) -> Change:
    return {stage: lambda v: factor * FORMULAS[stage](v)}


# ---- routing weights


def routing_weight(evidence: Evidence) -> Iterator[Explanation]:
    """The routing weight is left out, used twice, normalised, or that of another slot or token."""
    weights = evidence.inputs.weights.double()
    masked = evidence.inputs.expert_ids < 0
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
    for where, stage in (("", "w"), (" in the forward", OUTPUT), (" in the backward", "dy")):
        for text, make in other.items():
            cause = Cause.SLOT_WRONG if "slot" in text else Cause.ROUTING_WEIGHT
            change = {stage: _with_weight(stage, make(weights))}
            yield from evidence.test(cause, f"the routing weight{where} {text}", change)
    yield from _weight_in_gradients(evidence)
    yield from _weight_gradient(evidence)


def _weight_in_gradients(evidence: Evidence) -> Iterator[Explanation]:
    """The LoRA gradients of one projection lack the routing weight, or have it twice."""
    for projection in ("gate", "up", "down"):
        for text, make in (("is left out", torch.div), ("is used twice", torch.mul)):
            change: dict[str, Formula] = {}
            for name in (name for name in GRAD_NAMES if projection in name):
                rows = operands(name)[1]  # the operand that comes from dy
                change[name] = with_operands(name, **{rows: lambda v, n=rows, f=make: f(v[n], v["w"])})
            said = f"the routing weight in the gradients of {projection}'s LoRA {text}"
            yield from evidence.test(Cause.ROUTING_WEIGHT, said, change)


def _with_weight(stage: str, weights: Tensor) -> Formula:
    def leaf(v: ExpertValues) -> Tensor:
        return weights[v.rows, v.slots].unsqueeze(1)

    return leaf if stage == "w" else with_operands(stage, w=leaf)


def _weight_gradient(evidence: Evidence) -> Iterator[Explanation]:
    """grad_weights has the routing weight as a factor, uses another value, or is zero."""
    if not evidence.worth((GRAD_WEIGHTS,)):
        return
    other: dict[str, Formula] = {
        "has the weight in it": lambda v: (v["dy"] * v["y"]).sum(1),
        "is of y without LoRA": lambda v: (v["d_out"] * v["y_base"]).sum(1),
        "is divided by the weight": lambda v: (v["d_out"] * v["y"]).sum(1) / v["w"][:, 0],
        "is a mean, not a sum": lambda v: (v["d_out"] * v["y"]).mean(1),
        "is zero": lambda v: torch.zeros_like(v["w"][:, 0]),
    }
    for text, formula in other.items():
        yield from evidence.test(Cause.ROUTING_WEIGHT, f"grad_weights {text}", {GRAD_WEIGHTS: formula})
    right, weights = evidence.right[GRAD_WEIGHTS], evidence.inputs.weights.double()
    through_softmax = weights * (right - (weights * right).sum(1, keepdim=True))
    said = "grad_weights went through a softmax's backward"
    yield evidence.explanation(Cause.ROUTING_WEIGHT, said, {GRAD_WEIGHTS: through_softmax})


# ---- tensor parallel parts

# the values that are split by columns of I
_SPLIT = ("h", "dg", "du")
# where the share of a part may be lost: the stages of a sum over I
_TP_SUMS: dict[str, tuple[str, ...]] = {
    "the sum of the output": ("y_base", "h_da"),
    "the base's sum of the output": ("y_base",),
    "LoRA's sum of the output": ("h_da",),
    "the sum of grad_input": ("dx_gate", "dx_up", "dg_gb", "du_ub"),
    "the base's sum of grad_input": ("dx_gate", "dx_up"),
    "LoRA's sum of grad_input": ("dg_gb", "du_ub"),
}


def tp_parts(evidence: Evidence) -> Iterator[Explanation]:
    """Each part's share of every tensor with a factor of its own: 0 where it is missing, 2 where it is added twice."""
    degree, size = evidence.tp, evidence.case.intermediate
    if degree < 2:
        return
    # [I] per part: 1 in its columns, 0 elsewhere
    masks = [(torch.arange(size) // (size // degree) == part).double() for part in range(degree)]
    for part, mine in enumerate(masks):
        yield from _one_part(evidence, f"TP part {part} of {degree}", mine)
    parts = [evidence.layer.changed(_weighted(FORMULAS, 1 - mine)(0.0)) for mine in masks]
    for where, names in (
        ("", tuple(evidence.actual)),
        (" of output", (OUTPUT,)),
        (" of the gradients", BACKWARD_TENSORS),
        *((f" of {name}", (name,)) for name in BACKWARD_TENSORS),
    ):
        fitted = evidence.fit_shares(parts, names)
        if fitted is not None:
            said = ", ".join(f"TP part {i} of {degree}{where} {_word(factor)}" for i, factor in fitted[0].items())
            yield evidence.explanation(Cause.TP_PART, said, fitted[1])


def _one_part(evidence: Evidence, what: str, mine: Tensor) -> Iterator[Explanation]:
    """One part's factor in one of the sums over I, or in its columns of down_proj in forward and backward."""
    changes = {text: _weighted(stages, mine) for text, stages in _TP_SUMS.items()}
    changes["down_proj's product"] = lambda factor: {"down": lambda v: v["down"] * (1 + (factor - 1) * mine)}
    for text, change in changes.items():
        fitted = evidence.fit_factor(change)
        if fitted is not None and abs(fitted[0] - 1) >= NEAR:
            yield evidence.explanation(Cause.TP_PART, f"{what} in {text} {_word(fitted[0])}", fitted[1])


def _weighted(stages: Iterable[str], mine: Tensor) -> Callable[[float], Change]:
    """The columns `mine` [I] of what is split get a factor, in these stages."""

    def operand(name: str, factor: float) -> Formula:
        return lambda v: v[name] * (1 + (factor - 1) * mine)

    used = {stage: [name for name in _SPLIT if name in operands(stage)] for stage in stages}
    return lambda factor: {
        stage: with_operands(stage, **{name: operand(name, factor) for name in names})
        for stage, names in used.items()
        if names
    }


def _word(factor: float) -> str:
    if abs(factor) < NEAR:
        return "is missing"
    return "is added twice" if abs(factor - 2) < NEAR else f"has the factor {factor:.2f}"


def _short(value: float) -> str:
    """2.0, 0.125, 3.2e-05."""
    return f"{value:.1f}" if abs(value - round(value, 1)) < 1e-2 * max(abs(value), 0.1) else f"{value:.3g}"
