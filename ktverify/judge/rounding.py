"""How much rounding to bf16 does to a result: the unit of every budget.

docs/contract.md, "Numbers", lists the points at which a right engine may round. Here the oracle's formulas are computed
once without, and several times with an error of rounding at every one of those points. An engine that rounds at fewer
of them errs less: a sum of independent errors, symmetric about 0, only grows with each of them (T. W. Anderson, 1955).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ktverify.judge.reference import LayerInputs, Masks, dropped, of_rows, routed
from ktverify.spec.names import GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

PARTS = 4  # the largest tensor-parallel degree that is checked
MOST, LEAST = 16, 4  # draws: the square of an error is then known to 10 %, or to 20 %
# Numbers times draws from which on these are enough: MOST draws always give more. At 12, the approximation of
# gates.allowance is 9 % above the quantile, at 8 it is 43 %
FEWEST = 12
_VALUES = 1 << 20  # of all draws together, so that a case takes a second or two


# as tensors, because torch would make one of a number in every call
_6, _15, _16, _LOW_16, _LOW_17, _EXPONENT, *_FACTORS = (
    torch.tensor(number, dtype=torch.int32)
    for number in (6, 15, 16, 0xFFFF, 0x1FFFF, 0x7F800000, 0x2C1B3C6D, 0x297A2D39)
)


@dataclass(frozen=True)
class RoundingError:
    """What errors of rounding at every permitted point do to one tensor, from `draws` draws of all of them.

    rel_l2: root mean square of rel_l2 over the draws; mean_rel: mean of mean_rel. numbers: how many independent numbers
    make up the error: tr(C)^2 / tr(C^2) for its covariance C. strays: True if a draw has something other than 0 in a
    slice of the first axis in which the right answer cancels to zeros.
    """

    rel_l2: float
    mean_rel: float
    numbers: float
    draws: int
    strays: bool = False

    @property
    def enough_draws(self) -> bool:
        """False where the draws are too few to estimate the error of a further draw: numbers × draws below FEWEST."""
        return self.numbers * self.draws >= FEWEST


# of an engine that errs by nothing: it leaves the floor of each budget
NONE = RoundingError(0.0, 0.0, math.inf, 1)


def rounding_errors(
    inputs: LayerInputs, *, masks: Masks | None = None, backward: bool = True
) -> dict[str, RoundingError]:
    """The RoundingError of each of ALL_TENSORS; of output alone without backward. masks: as rounded_draws takes them.

    From MOST draws where few numbers err: of integer data, only where a value happens to be no bf16 number.
    """

    def of(draws: int | None) -> dict[str, RoundingError]:
        drawn = rounded_draws(inputs, draws, masks=masks, backward=backward)
        return {name: rounding_error(tensor) for name, tensor in drawn.items()}

    found = of(None)
    return found if all(each.enough_draws for each in found.values()) else of(MOST)


def rounding_error(drawn: Tensor) -> RoundingError:
    """The RoundingError of drawn [1 + draws, ...]: the right answer, and `draws` results with errors."""
    draws = len(drawn) - 1
    gram = torch.zeros(draws, draws, dtype=torch.float64)
    pairs = ~torch.eye(draws, dtype=torch.bool)
    square = absolute = errors = by_slice = 0.0
    strays = False
    for place in range(drawn.shape[1]):
        part = drawn[:, place]
        # idle experts' pages are read, not written
        if not bool(part.any()):
            continue
        part = part.reshape(len(part), -1).double()
        right, error = part[0], part[1:] - part[0]
        finite = torch.isfinite(part).all(0)
        right, error = right[finite], error[:, finite]
        strays = strays or not bool(right.any())
        here = error @ error.T
        gram += here
        by_slice += float((here[pairs] ** 2).mean())
        square += float(right @ right)
        absolute += float(right.abs().sum())
        errors += float(error.abs().sum()) / draws
    trace = float(gram.trace()) / draws
    # E <e, e'>^2 of two draws is tr(C^2). Where the draws are few, that of each slice (token, expert) steadies it:
    # slices err independently, unless tokens are equal
    fourth = float((gram[pairs] ** 2).mean()) if draws == MOST else by_slice
    numbers = max(1.0, trace**2 / fourth) if fourth > 0 else math.inf
    if square == 0:
        return RoundingError(math.inf if trace else 0.0, math.inf if trace else 0.0, numbers, draws, strays)
    return RoundingError(math.sqrt(trace / square), errors / absolute, numbers, draws, strays)


def draws_for(inputs: LayerInputs) -> int:
    """How many draws are worth their time: MOST where few numbers decide, fewer for wide cases."""
    experts, intermediate, hidden = inputs.gate_proj.shape
    slots = int((inputs.expert_ids >= 0).sum())
    active = min(experts, slots)
    rank = inputs.lora[LORA_NAMES[0]].shape[1]
    return max(LEAST, min(MOST, _VALUES // (1 + (slots + active * rank) * (hidden + intermediate))))


def rounded_draws(
    inputs: LayerInputs, draws: int | None = None, *, masks: Masks | None = None, backward: bool = True
) -> dict[str, Tensor]:
    """ALL_TENSORS, each [1 + draws, ...] in fp32: without errors of rounding, then with `draws` different sets of them.

    Within a draw, the same value gets the same error, as rounding would give it. So equal tokens err alike, and the
    results of several calls may be added draw by draw. draws: default `draws_for`. masks: those of dropout. Without
    backward, output alone.
    """
    draws = draws_for(inputs) if draws is None else draws
    at = _Rounding(draws)
    product, low_rank = at.product, at.low_rank
    s = inputs.case.scaling
    output = _zeros((1 + draws, *inputs.hidden_states.shape))
    result = {OUTPUT: output}
    if backward:
        result[GRAD_INPUT] = grad_input = _zeros(output.shape)
        result |= {name: _zeros((1 + draws, *inputs.lora[name.removeprefix("grad_")].shape)) for name in GRAD_NAMES}
        result[GRAD_WEIGHTS] = _zeros((1 + draws, *inputs.expert_ids.shape))
    for expert, rows, slots in routed(inputs.expert_ids):
        x, d_out = inputs.hidden_states[rows].float(), inputs.grad_output[rows].float()
        w = at(inputs.weights[rows, slots].float().unsqueeze(1))
        gate, up, down = (t[expert].float() for t in (inputs.gate_proj, inputs.up_proj, inputs.down_proj))
        ga, gb, ua, ub, da, db = (at(inputs.lora[name][expert].float()) for name in LORA_NAMES)

        m_gate, m_up, m_down = (None if m is None else m.float() for m in of_rows(masks, rows, slots))
        x_gate, x_up = (x if m is None else at(x * m) for m in (m_gate, m_up))
        x_ga, term = low_rank(x_gate, ga, gb, s)
        g = at(product(x, gate.T) + term)
        x_ua, term = low_rank(x_up, ua, ub, s)
        u = at(product(x, up.T) + term)
        sigma = at.saturating(torch.sigmoid(g))
        silu = at(g * sigma)
        h = at(silu * u)
        h_down = h if m_down is None else at(h * m_down)
        h_da, term = low_rank(h_down, da, db, s)
        y = at(product(h, down.T) + term)
        # the expert's slots of a token one after the other, as some may be two of one token
        at.add(output, rows, at(w * y))
        if not backward:
            continue

        result[GRAD_WEIGHTS][:, rows, slots] = at(at(d_out * y).sum(-1, keepdim=True)).squeeze(-1)
        dy = at(w * d_out)
        dy_db, term = low_rank(dy, db.mT, da.mT, s)
        dh = at(product(dy, down) + dropped(term, m_down))
        dg = at(at(dh * u) * at(sigma * at(1 + at(g * (1 - sigma)))))
        du = at(dh * silu)
        dg_gb, gate_term = low_rank(dg, gb.mT, ga.mT, s)
        du_ub, up_term = low_rank(du, ub.mT, ua.mT, s)
        dx = at(product(dg, gate) + product(du, up))
        at.add(grad_input, rows, at(at(dx + dropped(gate_term, m_gate)) + dropped(up_term, m_up)))
        for name, left, right in (
            ("grad_gate_lora_a", dg_gb, x_gate),
            ("grad_gate_lora_b", dg, x_ga),
            ("grad_up_lora_a", du_ub, x_up),
            ("grad_up_lora_b", du, x_ua),
            ("grad_down_lora_a", dy_db, h_down),
            ("grad_down_lora_b", dy, h_da),
        ):
            result[name][:, expert] = at(s * product(left.mT, right))
    return result


class _Rounding:
    """Adds an error of rounding to bf16 to values [p, q] or [1 + draws, p, q] fp32; the first draw has none.

    The error is uniform in half a unit of the last place, and follows from the value and the draw. It is 0 where the
    value is a bf16 number.
    """

    def __init__(self, draws: int) -> None:
        keys = np.arange(1 + draws, dtype=np.uint32) * np.uint32(0x9E3779B1)
        self.keys = torch.from_numpy(keys.view(np.int32)).view(-1, 1, 1)

    def __call__(self, value: Tensor, parts: Sequence[Tensor] = ()) -> Tensor:
        """`value` with its error. parts: values of which it is the sum; it gets the errors of those as well."""
        bits = value.contiguous().view(torch.int32)
        unit = _unit(bits)
        for part in parts if len(parts) > 1 else ():
            # hypot: the squares of small values would vanish
            torch.hypot(unit, _unit(part.contiguous().view(torch.int32)), out=unit)
        # without the last bits, in which sums in another order differ. In place: most of the time goes here
        mixed = (bits >> _6) ^ self.keys
        high = torch.empty_like(mixed)
        for factor in _FACTORS:
            torch.bitwise_right_shift(mixed, _15, out=high)
            mixed.bitwise_xor_(high.bitwise_and_(_LOW_17)).mul_(factor)
        torch.bitwise_right_shift(mixed, _16, out=high)
        error = mixed.bitwise_xor_(high.bitwise_and_(_LOW_16)).float().mul_(unit)
        error[0] = 0
        return error.add_(value)

    def saturating(self, value: Tensor) -> Tensor:
        """`value` rounded, but in the first draw: near 0 and 1, sigma errs by far less than half a unit."""
        rounded = value.to(torch.bfloat16).float()
        rounded[0] = value[0]
        return rounded

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a [..., n, K] times b [..., K, m]: PARTS partial sums, each with an error, and one of their sum."""
        cuts = [a.shape[-1] * part // PARTS for part in range(PARTS + 1)]
        parts = [a[..., i:j] @ b[..., i:j, :] for i, j in itertools.pairwise(cuts) if j > i]
        return self(sum(parts[1:], parts[0]), parts)

    def low_rank(self, value: Tensor, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
        """value Aᵀ, and s (value Aᵀ) Bᵀ, of A [r, in] and B [out, r]."""
        low = self.product(value, a.mT)
        return low, self(s * self.product(low, b.mT))

    def add(self, total: Tensor, rows: Tensor, value: Tensor) -> None:
        """total [1 + draws, T, H] += value [1 + draws, n, H] in `rows`, with an error of each sum."""
        left = torch.arange(len(rows))
        while len(left):
            here = rows[left]
            # the first of each token's slots that are left
            first = torch.ones(len(here), dtype=torch.bool)
            first[1:] = here[1:] != here[:-1]
            now = left[first]
            total[:, rows[now]] = self(total[:, rows[now]] + value[:, now])
            left = left[~first]


def _unit(bits: Tensor) -> Tensor:
    """2^-32 times the unit in bf16's last place at fp32 numbers of these bits; 0 for a bf16 number."""
    inexact = (bits & _LOW_16).clamp_(max=1)
    return (bits & _EXPONENT).mul_(inexact).view(torch.float32).mul_(2.0**-39)


def _zeros(shape: Sequence[int]) -> Tensor:
    """fp32 zeros that take memory only once written."""
    return torch.from_numpy(np.zeros(tuple(shape), np.float32))
