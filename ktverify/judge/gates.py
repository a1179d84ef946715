"""From a difference and its budgets to a verdict. All numbers are in tolerances.toml.

`peer_error` is the error of plain torch in bf16, of which every budget is a multiple. `judge` takes a case, a tensor's
name, its `Difference` and that error, and returns a `Judgement`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ktverify.judge.metrics import Difference, compare
from ktverify.judge.reference import forward_backward, peer_bf16
from ktverify.spec.cases import Case, catalogue, expects_zero, read_toml
from ktverify.spec.inputs import Inputs
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
    "rel_l2": "the budget that plain bf16 torch's own error leaves",
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


def peer_error(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """rel_l2 of reference.peer_bf16 by tensor; expected: forward_backward of `inputs`.

    For a case with few token slots, the root mean square over the case and its perturbed copies. Their number is in
    tolerances.toml because it affects the budgets.
    """
    squares = {name: [compare(tensor, expected[name]).rel_l2 ** 2] for name, tensor in peer_bf16(inputs).items()}
    case, numbers = inputs.case, tolerances()["peer"]
    weights = 3 * len(inputs.active) * case.hidden * case.intermediate
    few = 0 < case.qlen * case.top_k < numbers["neighbour_slots"] and weights <= numbers["neighbour_weights"]
    if few and not case.exact:
        for number in range(numbers["neighbours"]):
            near = _neighbour(inputs, number)
            right = forward_backward(near)
            for name, tensor in peer_bf16(near).items():
                squares[name].append(compare(tensor, right[name]).rel_l2 ** 2)
    return {name: math.sqrt(sum(found) / len(found)) for name, found in squares.items()}


def _neighbour(inputs: Inputs, number: int) -> Inputs:
    """A copy of the inputs with another last bit in half of the elements of hidden_states and grad_output."""
    x, d_out = _flip(inputs.hidden_states, f"x {number}"), _flip(inputs.grad_output, f"dO {number}")
    return replace(inputs, hidden_states=x, grad_output=d_out)


def _flip(tensor: torch.Tensor, seed: str) -> torch.Tensor:
    """[T, H] bf16 with the last bit of half of the elements flipped; 0, NaN and Inf stay."""
    bits = tensor.contiguous().view(torch.int16)
    count = bits.numel()
    # bytes of a hash, so that the flipped elements do not depend on the machine
    stream = hashlib.shake_256(f"ktverify neighbour {seed}".encode()).digest(max(1, count))
    coin = torch.frombuffer(bytearray(stream), dtype=torch.uint8)[:count].reshape(bits.shape).to(torch.int16) & 1
    alive = torch.isfinite(tensor) & (tensor != 0)
    return (bits ^ torch.where(alive, coin, 0).to(torch.int16)).view(torch.bfloat16)


def _allowance(numbers_deciding: float) -> float:
    """a = 1 + spread (1 / sqrt(n) - 1 / sqrt(few)) where n < few, else 1: how much more a draw of n numbers may err."""
    numbers = tolerances()["peer"]
    if numbers_deciding >= numbers["few"]:
        return 1.0
    return float(1 + numbers["spread"] * (1 / math.sqrt(max(1.0, numbers_deciding)) - 1 / math.sqrt(numbers["few"])))


def peer_budget(peer: float, numbers_deciding: float | None = None, *, capped: bool = True) -> float:
    """rel_l2 that an engine may have where plain bf16 torch has `peer`: min(cap, max(factor * peer, floor)).

    numbers_deciding: how many independent numbers the tensor is made of, n. Where n < few, factor is multiplied by
    a = 1 + spread (1 / sqrt(n) - 1 / sqrt(few)) and cap by a^2. capped=False leaves the cap out.
    """
    numbers = tolerances()["peer"]
    allowance = 1.0 if numbers_deciding is None else _allowance(numbers_deciding)
    if math.isnan(peer):
        return float(numbers["floor"])
    cap = numbers["cap"] * allowance**2 if capped else math.inf
    return float(min(cap, max(numbers["factor"] * allowance * peer, numbers["floor"])))


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
    bend = float(tolerances()["peer"]["bend"])
    if case.magnitudes[0] > bend and tensor in BACKWARD_TENSORS:
        found = min(found, int(slots * case.intermediate * bend / case.magnitudes[0]))
    return found


def own_limit(case: Case, tensor: str, isa: str, participation: float = math.inf) -> float | None:
    """The rel_l2 limit of an engine with fp32 sums on this case; None where only the peer's budget applies.

    On the catalogue's own seeds it is the number of tolerances.toml. Other inputs are a new draw: where fewer than
    `few` elements carry the tensor's norm, by their participation, it has the allowance of peer_budget.
    """
    numbers = tolerances()["own"]
    ordinary = case.data == "gaussian" and case.magnitude == 1
    if not ordinary or case.qlen < numbers["min_tokens"] or case.rank < numbers["min_rank"]:
        return None
    direction = "forward" if tensor == OUTPUT else "backward"
    limit = float(numbers[direction if isa in ("", AMX) else f"{direction}_other_isa"])
    return limit if catalogue().get(case.name) == case else limit * _allowance(participation)


# ---- verdict


def judge(
    case: Case,
    tensor: str,
    difference: Difference,
    peer: float,
    *,
    own_engine: bool = False,
    isa: str = "",
    searched: bool = False,
    gates_off: frozenset[str] = ALL_ON,
) -> Judgement:
    """The verdict on `tensor` of `case`: FAIL if any gate is exceeded, MISTRUSTED if the inputs were too empty.

    peer: rel_l2 of the plain bf16 peer on the same tensor. own_engine adds the strict limits and, on exact cases, equal
    bits. isa: the engine's instruction set; "" gets the limits of AMX. searched: the case came from a property search,
    so cap the number of independent numbers at the tensor's participation. gates_off: gates to leave out.
    """
    applied = _applied(case, tensor, difference, peer, own_engine, isa, searched)
    gates = [_gate(*each) for each in applied if each[0] not in gates_off]
    if any(gate.verdict is Verdict.FAIL for gate in gates):
        verdict = Verdict.FAIL
    elif "trust" not in gates_off:
        gates.append(_trust(case, tensor, difference, peer))
        verdict = gates[-1].verdict
    else:
        verdict = Verdict.PASS
    return Judgement(verdict, tuple(gates), _line(case, tensor, difference, verdict, gates))


def _applied(
    case: Case, tensor: str, difference: Difference, peer: float, own_engine: bool, isa: str, searched: bool
) -> list[tuple[str, float, float, str]]:
    numbers = tolerances()
    direction = "forward" if tensor == OUTPUT else "backward"
    deciding: float = numbers_deciding(case, tensor, difference.nonzero)
    if searched:
        deciding = min(deciding, difference.participation)
    limit = float(numbers["non_finite"]["unexpected"])
    found = [("non_finite", float(difference.non_finite), limit, "NaN or Inf")]
    # experts that a broken token reached may or may not show its NaN; the token's own rows must show it
    if tensor in TOKEN_TENSORS:
        limit = float(numbers["non_finite"]["missing"])
        found.append(("hidden_non_finite", float(difference.missing_non_finite), limit, "a NaN was hidden"))
    found.append(("stray", float(difference.stray), float(numbers["zero"]["stray"]), "must be exactly zero"))
    if difference.norm_expected == 0:
        pass  # every element is zero, idle or not finite, and the gates above have judged it
    elif peer > numbers["trust"]["max_peer"]:
        # no engine's relative error is small here: a pass is impossible (see _trust), a gross error still fails
        budget = peer_budget(peer, deciding, capped=False)
        found.append(("rel_l2", difference.rel_l2, budget, "the sum cancels"))
    else:
        found.append(("mean_rel", difference.mean_rel, float(numbers["outer"][direction]), "the contract's ceiling"))
        budget = peer_budget(peer, deciding)
        found.append(("rel_l2", difference.rel_l2, budget, f"the plain bf16 peer errs by {peer:.2e}"))
        limit_own = own_limit(case, tensor, isa, difference.participation) if own_engine else None
        if limit_own is not None:
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


def _trust(case: Case, tensor: str, difference: Difference, peer: float) -> GateResult:
    """MISTRUSTED where agreement proves nothing: the expected tensor is too empty or too badly conditioned."""
    numbers = tolerances()["trust"]
    least = float(numbers["min_density_exact" if case.exact else "min_density"])
    if expects_zero(case, tensor):
        return GateResult("trust", difference.density, 0.0, 0.0, Verdict.PASS, "zero by construction")
    limit = float(numbers["max_peer"])
    if difference.norm_expected > 0 and peer > limit:
        reason = f"plain bf16 itself errs by {peer:.1e}: the sum cancels, and its relative error tells nothing"
        return GateResult("trust", peer, limit, peer / limit, Verdict.MISTRUSTED, reason)
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
