"""From a difference and its budgets to a verdict. All numbers are in tolerances.toml.

Every budget is a multiple of what roundings to bf16 do to a tensor: its `RoundingError`. `judge` takes a case, a
tensor's name, its `Difference` and that error, and returns a `Judgement`.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktverify.judge.metrics import Difference
from ktverify.judge.rounding import RoundingError
from ktverify.spec.cases import Case, catalogue, expects_zero, read_toml
from ktverify.spec.names import BACKWARD_TENSORS, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT, TOKEN_TENSORS
from ktverify.system.instruction_sets import AMX

TOLERANCES = Path(__file__).with_name("tolerances.toml")

# Every gate, and what exceeds it. `judge` applies those up to "trust", the checks of ktverify/checks apply the rest.
# For each gate, ktverify/mutants has a wrong engine that no other gate finds.
GATES: dict[str, str] = {
    "non_finite": "a NaN or Inf where the oracle has none",
    "hidden_non_finite": "a number where the oracle has NaN or Inf",
    "stray": "something other than 0 in an idle expert's gradient or a masked token's row",
    "mean_rel": "the contract's ceiling on the mean relative error",
    "rel_l2": "the budget that roundings to bf16 at every permitted point leave",
    "rel_l2_own": "the limit of fp32 sums and one rounding",
    "exact": "other bits than the one right answer of integer data",
    "trust": "expected values too empty to believe a pass",
    "loss": "ten steps' losses, and the parameters after them, beside the oracle's",
    "tp": "more than the order of one sum between tensor-parallel degrees or batches",
    "bits": "other bits from what has to be the same computation",
    "form": "a result of another shape, dtype or layout than the contract's, or in memory that something else uses",
    "masks": "dropout masks with another share than p, or that depend on one another",
    "written": "an input or an earlier result that was written to",
    "refusal": "bad input that was accepted, or refused in other words than the contract's",
    "resources": "more threads or memory than the contract allows",
}
ALL_ON: frozenset[str] = frozenset()


def gates_off(*names: str) -> frozenset[str]:
    """The gates that a check leaves out, to show what each is needed for. ValueError for an unknown name."""
    for name in names:
        if name not in GATES:
            raise ValueError(f"gate is {name!r}, it takes one of {', '.join(GATES)}")
    return frozenset(names)


class Verdict(enum.Enum):
    """Only PASS is a pass. MISTRUSTED: the expected values were too empty to believe a pass.

    CRASH: the engine raised an exception or its process died; TIMEOUT: no answer within the time limit; OOM: more
    memory than the limit; UNSUPPORTED: the engine declares that it cannot do this.
    """

    PASS = "PASS"
    FAIL = "FAIL"
    CRASH = "CRASH"
    TIMEOUT = "TIMEOUT"
    OOM = "OOM"
    SKIP = "SKIP"
    UNSUPPORTED = "UNSUPPORTED"
    MISTRUSTED = "MISTRUSTED"


@dataclass(frozen=True)
class GateResult:
    """One gate: `value` may be at most `budget`; used = value / budget (for a budget of 0: 0 or inf)."""

    gate: str
    value: float
    budget: float
    used: float
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Judgement:
    """The verdict on one tensor, every gate that was applied, and the line to print."""

    verdict: Verdict
    gates: tuple[GateResult, ...]
    line: str

    @property
    def exceeded(self) -> tuple[GateResult, ...]:
        """The gates that did not pass."""
        return tuple(gate for gate in self.gates if gate.verdict is not Verdict.PASS)


@functools.cache
def tolerances() -> dict[str, Any]:
    """tolerances.toml, parsed."""
    return read_toml(TOLERANCES)


# ---- budgets


def allowance(rounding: RoundingError) -> float:
    """How many times its root mean square an error may have: the `deviations` quantile, at least 1.

    The square of an error that n independent numbers make up, over its mean from `draws` such errors, has an F
    distribution of n and n draws degrees of freedom; its quantile by E. Paulson's approximation (1942). With few
    degrees that is too large, and below 5.5 it has no value; there the quantile is sought in the distribution itself.
    """
    if math.isinf(rounding.numbers):
        return 1.0
    z = float(tolerances()["rounding"]["deviations"])
    if not rounding.enough_draws:
        return math.sqrt(_quantile(rounding.numbers, rounding.numbers * rounding.draws, 0.5 * math.erfc(z / 2**0.5)))
    above, below = 2 / (9 * rounding.numbers), 2 / (9 * rounding.numbers * rounding.draws)
    root = math.sqrt((1 - above) ** 2 * below + (1 - below) ** 2 * above - z * z * above * below)
    # the cube root of F
    return float((((1 - above) * (1 - below) + z * root) / ((1 - below) ** 2 - z * z * below)) ** 1.5)


def _quantile(n: float, m: float, tail: float) -> float:
    """The value that an F distribution of n and m degrees of freedom exceeds with the probability `tail`, by halving
    its logarithm's interval; 0.1 % near."""
    low, high = 0.0, 100.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        if _incomplete_beta(m / 2, n / 2, m / (m + n * math.exp(middle))) > tail:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1, by the continued fraction 8.17.22 of NIST's
    Digital Library of Mathematical Functions. It converges below (a + 1) / (a + b + 2); above, I_x = 1 - I_1-x(b, a).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    for i in range(200, 0, -1):
        half = i // 2
        if i % 2:
            step = -(a + half) * (a + b + half) * x / ((a + i - 1) * (a + i))
        else:
            step = half * (b - half) * x / ((a + i - 1) * (a + i))
        fraction = 1 + step / fraction
    factor = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(factor) / (a * fraction)


def budget(rounding: RoundingError) -> float:
    """The rel_l2 that every engine may have: `allowance` times that of roundings to bf16 at every permitted point."""
    return max(allowance(rounding) * rounding.rel_l2, float(tolerances()["rounding"]["floor"]))


def _draw_of_few(numbers_deciding: float) -> float:
    """1 + spread (1 / sqrt(n) - 1 / sqrt(few)) where n < few, else 1: how much more a draw of n numbers may err."""
    numbers = tolerances()["own"]
    if numbers_deciding >= numbers["few"]:
        return 1.0
    return float(1 + numbers["spread"] * (1 / math.sqrt(max(1.0, numbers_deciding)) - 1 / math.sqrt(numbers["few"])))


def numbers_deciding(case: Case, tensor: str, nonzero: int) -> int:
    """How many independent numbers determine the relative error of `tensor`; nonzero: its elements other than 0.

    A LoRA gradient is a sum of outer products of r-vectors, one per token slot of T k: its elements err together, and T
    k r numbers decide. The same holds for every tensor where LoRA dominates. Of gates of magnitude m > 4, all but about
    4 / m are open or shut; those 4 / m carry the error of every product with silu'. Of other tensors, each element
    counts.
    """
    slots = case.qlen * case.top_k
    found = nonzero
    if tensor in GRAD_NAMES or (case.data == "strong_lora" and tensor != GRAD_WEIGHTS):
        found = min(found, slots * case.rank)
    bend = float(tolerances()["own"]["bend"])
    if case.magnitudes[0] > bend and tensor in BACKWARD_TENSORS:
        found = min(found, int(slots * case.intermediate * bend / case.magnitudes[0]))
    return found


def own_limit(case: Case, tensor: str, isa: str, participation: float = math.inf) -> float | None:
    """The rel_l2 limit of an engine with fp32 sums on this case; None where only the budget of all applies.

    On the catalogue's own seeds it is the number of tolerances.toml. Other inputs are a new draw: where fewer than
    `few` elements carry the tensor's norm, by their participation, it is wider by `_draw_of_few`.
    """
    numbers = tolerances()["own"]
    ordinary = case.data == "gaussian" and case.magnitude == 1
    if not ordinary or case.qlen < numbers["min_tokens"] or case.rank < numbers["min_rank"]:
        return None
    direction = "forward" if tensor == OUTPUT else "backward"
    limit = float(numbers[direction if isa in ("", AMX) else f"{direction}_other_isa"])
    return limit if catalogue().get(case.name) == case else limit * _draw_of_few(participation)


# ---- verdict


def judge(
    case: Case,
    tensor: str,
    difference: Difference,
    rounding: RoundingError,
    *,
    own_engine: bool = False,
    isa: str = "",
    gates_off: frozenset[str] = ALL_ON,
) -> Judgement:
    """The verdict on `tensor` of `case`: FAIL if any gate is exceeded, MISTRUSTED if the inputs were too empty.

    rounding: what errors of rounding do to the same tensor. own_engine adds the strict limits and, on exact cases,
    equal bits. isa: the engine's instruction set; "" gets the limits of AMX. gates_off: gates to leave out.
    """
    applied = _applied(case, tensor, difference, rounding, own_engine, isa)
    gates = [_gate(*each) for each in applied if each[0] not in gates_off]
    if any(gate.verdict is Verdict.FAIL for gate in gates):
        verdict = Verdict.FAIL
    elif "trust" not in gates_off:
        gates.append(_trust(case, tensor, difference, rounding.rel_l2))
        verdict = gates[-1].verdict
    else:
        verdict = Verdict.PASS
    return Judgement(verdict, tuple(gates), _line(case, tensor, difference, verdict, gates))


def _applied(
    case: Case, tensor: str, difference: Difference, rounding: RoundingError, own_engine: bool, isa: str
) -> list[tuple[str, float, float, str]]:
    numbers = tolerances()
    direction = "forward" if tensor == OUTPUT else "backward"
    limit = float(numbers["non_finite"]["unexpected"])
    found = [("non_finite", float(difference.non_finite), limit, "NaN or Inf")]
    # experts that a broken token reached may or may not show its NaN; the token's own rows must show it
    if tensor in TOKEN_TENSORS:
        limit = float(numbers["non_finite"]["missing"])
        found.append(("hidden_non_finite", float(difference.missing_non_finite), limit, "a NaN was hidden"))
    if not rounding.strays:
        found.append(("stray", float(difference.stray), float(numbers["zero"]["stray"]), "must be exactly zero"))
    if difference.norm_expected > 0:
        # a sketch knows the error up to its own
        times = 1 + float(numbers["rounding"]["sketch"]) if difference.estimated else 1.0
        ceiling = max(float(numbers["outer"][direction]), times * allowance(rounding) * rounding.mean_rel)
        reason = f"roundings to bf16 leave {rounding.rel_l2:.2e}"
        if rounding.rel_l2 <= numbers["trust"]["max_rounding"]:
            found.append(("mean_rel", difference.mean_rel, ceiling, "the contract's ceiling"))
        found.append(("rel_l2", difference.rel_l2, times * budget(rounding), reason))
        limit_own = own_limit(case, tensor, isa, difference.participation) if own_engine else None
        if limit_own is not None and rounding.rel_l2 <= numbers["trust"]["max_rounding"]:
            found.append(("rel_l2_own", difference.rel_l2, limit_own, "what fp32 sums and one rounding leave"))
    if case.exact and own_engine:
        # -1: a golden without the full tensor. An exact case proves nothing with it, so it must not pass
        count = math.inf if difference.mismatched < 0 else float(difference.mismatched)
        found.append(("exact", count, float(numbers["exact"]["mismatched"]), "integer data has one right answer"))
    return found


def _gate(name: str, value: float, budget: float, reason: str) -> GateResult:
    kept = value <= budget  # False for NaN
    used = value / budget if budget > 0 else 0.0 if kept else math.inf
    return GateResult(name, value, budget, used, Verdict.PASS if kept else Verdict.FAIL, reason)


def _trust(case: Case, tensor: str, difference: Difference, rounding: float) -> GateResult:
    """MISTRUSTED where agreement proves nothing: the expected tensor is too empty or too badly conditioned."""
    numbers = tolerances()["trust"]
    least = float(numbers["min_density_exact" if case.exact else "min_density"])
    if expects_zero(case, tensor):
        return GateResult("trust", difference.density, 0.0, 0.0, Verdict.PASS, "zero by construction")
    limit = float(numbers["max_rounding"])
    if difference.norm_expected > 0 and rounding > limit:
        reason = f"roundings to bf16 alone leave {rounding:.1e}: the sum cancels, and its relative error tells nothing"
        return GateResult("trust", rounding, limit, rounding / limit, Verdict.MISTRUSTED, reason)
    believed = difference.nonzero >= numbers["min_nonzero"] and difference.density >= least
    few = f"only {difference.nonzero} of {difference.numel} expected elements are other than 0"
    reason, verdict = ("expected values are alive", Verdict.PASS) if believed else (few, Verdict.MISTRUSTED)
    used = least / difference.density if difference.density > 0 else math.inf
    return GateResult("trust", difference.density, least, used, verdict, reason)


def _line(case: Case, tensor: str, difference: Difference, verdict: Verdict, gates: list[GateResult]) -> str:
    shown = next((gate for gate in gates if gate.verdict is not Verdict.PASS), None)
    if shown is None:
        numeric = [gate for gate in gates if gate.gate != "trust"]
        shown = max(numeric, key=lambda gate: (gate.used, gate.gate == "rel_l2"))
    elif shown.gate == "mean_rel":
        # both relative gates usually fail together; rel_l2 is the one that is compared elsewhere
        shown = next((g for g in gates if g.gate == "rel_l2" and g.verdict is Verdict.FAIL), shown)
    text = f"{verdict.value} {tensor} {shown.gate} {_number(shown.value)}, budget {_number(shown.budget)}"
    if shown.gate == "trust":
        text = f"{verdict.value} {tensor}: {shown.reason}"
    elif shown.budget > 0:
        text += f" ({shown.used:.0%})".replace("%", " %")
    if difference.worst_index:
        text += f", worst {list(difference.worst_index)}"
    if verdict is not Verdict.PASS:
        text += f"\npython -m ktverify repro '{case.id}'"
    return text


def _number(value: float) -> str:
    """Two digits (3.1e-2) for a measure, all digits for a count, and "inf" or "nan"."""
    if not math.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
