"""Hypotheses about silu and its derivative: another function is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.formulas import Formula, label

_Function = Callable[[Tensor], Tensor]
_Shift = Callable[[Tensor, float], Tensor]

FUNCTIONS: dict[str, _Function] = {
    "gelu": functional.gelu,
    "gelu by tanh": lambda g: functional.gelu(g, approximate="tanh"),
    "g sigmoid(1.702 g)": lambda g: g * torch.sigmoid(1.702 * g),
    "relu": torch.relu,
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "mish": functional.mish,
    "g itself": lambda g: g,
    "silu of a clamped g": lambda g: functional.silu(g.clamp(-7, 7)),
}
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid(g)": lambda g, sigma: sigma,
    "1": lambda g, sigma: torch.ones_like(g),
    "sigmoid(g) (1 - sigmoid(g))": lambda g, sigma: sigma * (1 - sigma),
    "sigmoid(g) (1 + g)": lambda g, sigma: sigma * (1 + g),
    "sigmoid(g) (1 - g (1 - sigmoid(g)))": lambda g, sigma: sigma * (1 - g * (1 - sigma)),
    "sigmoid(g) (1 + g sigmoid(g))": lambda g, sigma: sigma * (1 + g * sigma),
    "sigmoid(g) + g (1 - sigmoid(g))": lambda g, sigma: sigma + g * (1 - sigma),
    "1 + g (1 - sigmoid(g))": lambda g, sigma: 1 + g * (1 - sigma),
    "silu(g)": lambda g, sigma: g * sigma,
    "g > 0": lambda g, sigma: (g > 0).double(),
    "sigmoid(g), clamped": lambda g, sigma: (0.5 + g / 4).clamp(0, 1),
    "1/2 + g / 2": lambda g, sigma: 0.5 + g / 2,
    "hardswish'(g)": lambda g, sigma: _slope(functional.hardswish)(g),
    "gelu'(g)": lambda g, sigma: _slope(functional.gelu)(g),
}


def activation(evidence: Evidence) -> Iterator[Explanation]:
    """Another function than silu, with its own derivative or that of silu; or silu with another derivative."""
    for text, function in FUNCTIONS.items():
        forward: dict[str, Formula] = {"silu": lambda v, f=function: f(v["g"])}  # type: ignore[misc]
        whole = {**forward, "dsilu": lambda v, f=function: _slope(f)(v["g"])}  # type: ignore[misc]
        yield from evidence.test(Cause.ACTIVATION, f"the activation is {text}, expected silu", whole)
        said = f"the activation is {text}, expected silu (its derivative is silu's)"
        yield from evidence.test(Cause.ACTIVATION, said, forward)
        only: dict[str, Formula] = {"h": lambda v, f=function: f(v["g"]) * v["u"]}  # type: ignore[misc]
        said = f"the activation in the forward is {text}, expected silu (the backward's is silu)"
        yield from evidence.test(Cause.ACTIVATION, said, only)
    for text, slope in DERIVATIVES.items():
        change: dict[str, Formula] = {"dsilu": lambda v, f=slope: f(v["g"], v["sigma"])}  # type: ignore[misc]
        said = f"silu' is {text}, expected sigmoid(g) (1 + g (1 - sigmoid(g)))"
        yield from evidence.test(Cause.ACTIVATION, said, change)


def shifted(evidence: Evidence) -> Iterator[Explanation]:
    """silu uses sigmoid(g + b) (an exp with a constant relative error) or sigmoid(a g); silu' at another value."""
    ways: tuple[tuple[str, float, _Shift], ...] = (
        ("g {:+.4f}", 0.0, lambda g, b: g * torch.sigmoid(g + b)),
        ("{:.4f} g", 1.0, lambda g, a: g * torch.sigmoid(a * g)),
    )
    for way, right, shift in ways:
        for where, change in _places(shift):
            fitted = evidence.fit_factor(change, right)
            if fitted is None or abs(fitted[0] - right) < 1e-4:
                continue
            said = f"silu takes sigmoid({way.format(fitted[0])}){where}, expected sigmoid(g)"
            if right == 0:
                said += f", as an exp that is off by {100 * abs(math.expm1(-fitted[0])):.1f} % has it"
            yield evidence.explanation(Cause.ACTIVATION, said, fitted[1])
    for other in ("silu", "u", "h", "g_base", "sigma"):
        at: dict[str, Formula] = {"dsilu": lambda v, n=other: _slope(functional.silu)(v[n])}  # type: ignore[misc]
        said = f"silu' is evaluated at {label(other)}, expected g"
        yield from evidence.test(Cause.ACTIVATION, said, at)


def _places(shift: _Shift) -> Iterator[tuple[str, Callable[[float], dict[str, Formula]]]]:
    """(where, change): silu and its derivative, silu only, or silu in h only."""

    def slope(number: float) -> Formula:
        return lambda v: _slope(lambda g: shift(g, number))(v["g"])

    yield "", lambda number: {"silu": lambda v: shift(v["g"], number), "dsilu": slope(number)}
    yield " (its derivative is silu's)", lambda number: {"silu": lambda v: shift(v["g"], number)}
    yield " in the forward", lambda number: {"h": lambda v: shift(v["g"], number) * v["u"]}


def _slope(function: _Function) -> _Function:
    def slope(g: Tensor) -> Tensor:
        with torch.enable_grad():
            at = g.detach().clone().requires_grad_()
            return torch.autograd.grad(function(at).sum(), at)[0]

    return slope
