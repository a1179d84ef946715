"""Properties of every right layer, whatever the case: one function per property.

Input: a Trial, a case on the engine under test. AssertionError with what differs where the property is violated.
A property is added by writing a function under @states; its name is the test's.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import changed, rows_of, with_case
from ktverify.checks.check import Check
from ktverify.checks.check import enter as enter_checks
from ktverify.checks.judging import BUDGET, NUMBERS, expect_forms
from ktverify.checks.property_trial import Right, Tensors, Trial
from ktverify.checks.target import Target, expect
from ktverify.judge import gates, metrics, reference
from ktverify.judge.rounding import rounded_draws
from ktverify.spec.cases import Case
from ktverify.spec.names import ALL_TENSORS, BASE_NAMES, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

ROWS = (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS)


@dataclass(frozen=True)
class Property:
    """check: the function; what: the sentence; fixed: fields of Case that it needs; splits: I that TP 2 divides."""

    check: Callable[[Trial], None]
    what: str
    fixed: dict[str, object] = field(default_factory=dict)
    splits: bool = False


PROPERTIES: dict[str, Property] = {}


def states(what: str, *, splits: bool = False, **fixed: object) -> Callable[[Callable[[Trial], None]], None]:
    """Enters the function under its name."""

    def enter(check: Callable[[Trial], None]) -> None:
        name = check.__name__
        PROPERTIES[name] = Property(check, what, fixed, splits)
        enter_checks(
            [
                Check(
                    f"property/{name}",
                    "properties",
                    check_property,
                    BUDGET,
                    NUMBERS,
                    arguments={"name": name},
                    drawn=True,
                )
            ]
        )

    return enter


def check_property(target: Target, name: str, case: Case) -> tuple[int, int]:
    """(comparisons, those that could be believed) of property `name` on `case`. AssertionError where it is violated."""
    trial = Trial(target, case)
    PROPERTIES[name].check(trial)
    return trial.compared, trial.believed


def _generator(trial: Trial) -> torch.Generator:
    return torch.Generator().manual_seed(trial.case.seed)


def _repeats(ids: Tensor) -> bool:
    """True if some token names one expert twice."""
    ordered = ids.sort(dim=1).values
    return bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())


@states("every tensor is within its budget")
def within_budget(trial: Trial) -> None:
    trial.keeps("as drawn", trial.plain)


# ---- permutations


@states("experts in another order, ids with them: the same rows, their gradients in that order")
def permuted_experts(trial: Trial) -> None:
    inputs = trial.inputs
    order = torch.randperm(trial.case.num_experts, generator=_generator(trial))
    back = torch.argsort(order)
    ids = torch.where(inputs.expert_ids < 0, -1, back[inputs.expert_ids.clamp(min=0)])
    tensors = {name: getattr(inputs, name)[order] for name in BASE_NAMES}
    lora = {name: inputs.lora[name][order] for name in LORA_NAMES}
    found = trial.run(changed(inputs, expert_ids=ids, **tensors, **lora))
    found |= {name: found[name][back] for name in GRAD_NAMES}
    trial.keeps("permuted experts", found)
    # one expert's rows stay as they are; the sum over a token's experts has another order
    trial.same("permuted experts", trial.plain, found, (*GRAD_NAMES, GRAD_WEIGHTS))
    trial.close("permuted experts", found, trial.plain, (OUTPUT, GRAD_INPUT))


@states("tokens in another order: their rows in that order, the same LoRA gradients")
def permuted_tokens(trial: Trial) -> None:
    order = torch.randperm(trial.case.qlen, generator=_generator(trial))
    found = trial.run(rows_of(trial.inputs, order))
    found |= {name: found[name][torch.argsort(order)] for name in ROWS}
    trial.keeps("permuted tokens", found)
    # no row's own sums change; a LoRA gradient is a sum over tokens
    trial.same("permuted tokens", trial.plain, found, ROWS)
    trial.close("permuted tokens", found, trial.plain, GRAD_NAMES)


@states("slots in another order: the same result, the routing gradient in that order")
def permuted_slots(trial: Trial) -> None:
    inputs = trial.inputs
    order = torch.randperm(trial.case.top_k, generator=_generator(trial))
    found = trial.run(changed(inputs, expert_ids=inputs.expert_ids[:, order], weights=inputs.weights[:, order]))
    found[GRAD_WEIGHTS] = found[GRAD_WEIGHTS][:, torch.argsort(order)]
    trial.keeps("permuted slots", found)
    # an engine goes through the experts, so slots are no order of a sum, unless one expert is in two of them
    names = (GRAD_WEIGHTS,) if _repeats(inputs.expert_ids) else ALL_TENSORS
    trial.same("permuted slots", trial.plain, found, names)


# ---- batches


def _cuts(trial: Trial, parts: int) -> list[slice]:
    ends = torch.randint(0, trial.case.qlen + 1, (parts - 1,), generator=_generator(trial)).sort().values.tolist()
    bounds = [0, *ends, trial.case.qlen]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def _joined(parts: list[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in ROWS}


@states("a batch split in two: the same rows, and LoRA gradients that add up")
def split_batch(trial: Trial) -> None:
    halves = [rows_of(trial.inputs, cut) for cut in _cuts(trial, 2)]
    found = [trial.run(half) for half in halves]
    trial.keeps("rows of two halves", _joined(found))
    # kernels for few rows may sum along another order, so integer data owes the bits (judged above) and other data this
    trial.close("rows of two halves", _joined(found), trial.plain, ROWS)
    total = {name: found[0][name].double() + found[1][name].double() for name in GRAD_NAMES}
    right = Right.total([Right.of(half) for half in halves], GRAD_NAMES)
    trial.keeps("the sum of two halves' gradients", total, right, exact=False)
    for name in GRAD_NAMES:
        # the oracle itself must add up, to far more digits than any budget has
        apart = metrics.compare(right.tensors[name], trial.right.tensors[name])
        expect(apart.rel_l2 <= gates.tolerances()["tp"]["rel_l2"], f"the oracle's {name} does not add up")


@states("gradients accumulated over three calls equal those of one call on all tokens")
def accumulated_gradients(trial: Trial) -> None:
    inputs = trial.inputs
    layer = trial.target.layer(inputs.case, inputs)
    parts = [rows_of(inputs, cut) for cut in _cuts(trial, 3)]
    built_in = "accumulate" in inspect.signature(layer.backward).parameters
    total: Tensors = {name: torch.zeros(inputs.lora[name[5:]].shape, dtype=torch.float64) for name in GRAD_NAMES}
    for part in parts:
        layer.forward_sft(part.hidden_states, part.expert_ids, part.weights, save_for_backward=True)
        if built_in:
            # the sum so far, kept in fp32 and rounded once: the budget is that of one call
            total = dict(layer.backward(part.grad_output, accumulate=True)[1])
        else:
            found = layer.backward(part.grad_output)[1]
            expect_forms(trial.target, "accumulated over three calls", found, part)
            for name, gradient in found.items():
                total[name] += gradient.double()
    right = trial.right if built_in else Right.total([Right.of(part) for part in parts], GRAD_NAMES)
    trial.keeps("accumulated over three calls", total, right, exact=built_in)


# ---- LoRA


@states("with LoRA B = 0 the layer is the base, whatever LoRA A contains", data="zero_b", magnitude=1.0)
def zero_lora_b(trial: Trial) -> None:
    inputs = trial.inputs
    bare = changed(inputs, **{name: torch.zeros_like(inputs.lora[name]) for name in LORA_NAMES})
    found = trial.run(bare)
    rows = {name: trial.plain[name] for name in ROWS}
    trial.keeps("LoRA B = 0", rows, Right.of(bare))
    trial.keeps("LoRA A = B = 0", {name: found[name] for name in ROWS})
    # what is added is exactly zero
    trial.same("LoRA B = 0 and LoRA A = B = 0", rows, found, ROWS)


@states("alpha times 4 with LoRA B / 4 is the same layer; with LoRA in down only, alpha scales what LoRA adds")
def scaled_alpha(trial: Trial) -> None:
    inputs = trial.inputs
    quarter = {name: tensor / 4 for name, tensor in inputs.lora.items() if name.endswith("_b")}
    found = trial.run(with_case(changed(inputs, **quarter), alpha=4 * inputs.case.alpha))
    found |= {name: found[name] / 4 for name in GRAD_NAMES if name.endswith("_b")}
    trial.keeps("alpha times 4, LoRA B / 4", found)
    trial.same("alpha times 4, LoRA B / 4", trial.plain, found, ALL_TENSORS)

    down = changed(inputs, **{name: torch.zeros_like(inputs.lora[name]) for name in ("gate_lora_b", "up_lora_b")})
    base = changed(down, down_lora_b=torch.zeros_like(inputs.lora["down_lora_b"]))
    double = with_case(down, alpha=2 * inputs.case.alpha)
    once, nothing = (reference.forward_backward(given, backward=False)[OUTPUT] for given in (down, base))
    right = Right({OUTPUT: 2 * once - nothing}, Right.of(double).drawn)
    trial.keeps("alpha times 2, LoRA in down only", {OUTPUT: trial.run(double)[OUTPUT]}, right, exact=False)


# ---- routing


@states("two slots with one expert equal one slot with the sum of their weights", routing="duplicate")
def merged_slots(trial: Trial) -> None:
    inputs = trial.inputs
    ids, weights = inputs.expert_ids.clone(), inputs.weights.clone()
    ids[:, 1] = -1
    weights[:, 0] += weights[:, 1]
    merged = changed(inputs, expert_ids=ids, weights=weights)
    found = trial.run(merged)
    found[GRAD_WEIGHTS] = found[GRAD_WEIGHTS].clone()
    expect(not bool(found[GRAD_WEIGHTS][:, 1].any()), "grad_weights of a slot of id -1 must be zero")
    found[GRAD_WEIGHTS][:, 1] = found[GRAD_WEIGHTS][:, 0]

    @functools.cache
    def drawn() -> Tensors:
        result = rounded_draws(merged)
        result[GRAD_WEIGHTS][:, :, 1] = result[GRAD_WEIGHTS][:, :, 0]
        return result

    trial.keeps("as drawn", trial.plain)
    # the sum of two weights takes more bits than either, so integer data is no longer exact
    trial.keeps("one slot with the sum of two weights", found, Right(trial.right.tensors, drawn), exact=False)


@states("experts that no token reaches do not matter, even if their weights are NaN")
def idle_experts(trial: Trial) -> None:
    inputs, more = trial.inputs, 2

    def widened(tensor: Tensor) -> Tensor:
        wide = torch.full((tensor.shape[0] + more, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
        wide[more:][inputs.active] = tensor[inputs.active]
        return wide

    tensors = {name: widened(getattr(inputs, name)) for name in BASE_NAMES}
    lora = {name: widened(tensor) for name, tensor in inputs.lora.items()}
    ids = torch.where(inputs.expert_ids < 0, -1, inputs.expert_ids + more)
    slots = torch.cat([torch.arange(more), inputs.physical_map + more])
    wide = changed(inputs, expert_ids=ids, physical_map=slots, **tensors, **lora)
    found = trial.run(with_case(wide, num_experts=trial.case.num_experts + more))
    for name in GRAD_NAMES:
        expect(not bool(found[name][:more].any()), f"{name} of the experts that were added is not zero")
        found[name] = found[name][more:]
    trial.keeps("two idle experts more, all idle ones NaN", found)
    trial.same("two idle experts more, all idle ones NaN", trial.plain, found, ALL_TENSORS)


@states("the output is linear in the routing weights")
def linear_weights(trial: Trial) -> None:
    inputs = trial.inputs
    doubled = trial.run(changed(inputs, weights=2 * inputs.weights))
    halved = {name: tensor if name == GRAD_WEIGHTS else tensor / 2 for name, tensor in doubled.items()}
    trial.keeps("weights times 2", halved)
    trial.same("weights times 2", trial.plain, halved, ALL_TENSORS)

    coin = torch.randint(0, 2, inputs.weights.shape, generator=_generator(trial))
    parts = [changed(inputs, weights=inputs.weights * chosen) for chosen in (coin, 1 - coin)]
    found = [trial.run(part)[OUTPUT].double() for part in parts]
    right = Right.total([Right.of(part) for part in parts], (OUTPUT,))
    trial.keeps("the sum over two halves of the weights", {OUTPUT: found[0] + found[1]}, right, exact=False)


# ---- tensor parallelism


@states("TP 2 and 4 equal TP 1", splits=True)
def tensor_parallel(trial: Trial) -> None:
    for degree in trial.case.tp:
        found = trial.plain if degree == 1 else trial.run(trial.inputs, tp=degree)
        trial.keeps(f"TP {degree}", found)
        trial.close(f"TP {degree} and TP 1", found, trial.plain, ALL_TENSORS)


# ---- derivatives


@states("the oracle's gradients are its finite differences, and the engine's those of its own output")
def finite_differences(trial: Trial) -> None:
    _oracle_differences(trial)
    trial.keeps("as drawn", trial.plain)
    _own_differences(trial)


def _oracle_differences(trial: Trial) -> None:
    """Central differences of the oracle, for each tensor the entry of the largest gradient and a drawn one."""
    inputs, floor = trial.inputs, float(gates.tolerances()["rounding"]["floor"])
    upstream = inputs.grad_output.double()
    for name in ("hidden_states", "weights", *LORA_NAMES):
        tensor = (inputs.lora[name] if name in LORA_NAMES else getattr(inputs, name)).double()
        gradient = trial.right.tensors[GRAD_INPUT if name == "hidden_states" else f"grad_{name}"]
        if not bool(gradient.any()):
            continue
        drawn = int(torch.randint(0, tensor.numel(), (1,), generator=_generator(trial)))
        entries = [int(gradient.abs().argmax()), drawn]
        # the step that balances a third derivative of order 1 against fp64's rounding
        step = torch.finfo(torch.float64).eps ** (1 / 3) * max(float(tensor.abs().max()), math.ldexp(1, -20))
        slopes = []
        for entry in entries:
            ends = []
            for sign in (1, -1):
                moved = tensor.clone()
                moved.view(-1)[entry] += sign * step
                ends.append(reference.forward_backward(changed(inputs, **{name: moved}), backward=False)[OUTPUT])
            slopes.append(float(((ends[0] - ends[1]) * upstream).sum()) / (2 * step))
        apart = metrics.compare(torch.tensor(slopes, dtype=torch.float64), gradient.reshape(-1)[entries])
        expect(apart.rel_l2 <= floor, f"the oracle's gradient of {name} is {apart.rel_l2:.1e} from finite differences")


def _own_differences(trial: Trial) -> None:
    """<grad, D> is <dO, out(p + D) - out(p)> for p = weights and LoRA B of down, in which the output is linear.

    No oracle here. Each output may be off by its budget, and so may the gradient: |<dO, a> - <dO, b>| <= |dO| |a - b|.
    """
    inputs, plain, upstream = trial.inputs, trial.plain, trial.inputs.grad_output.double()
    for name in ("weights", "down_lora_b"):
        gradient = plain[f"grad_{name}"].double()
        tensor = inputs.lora[name] if name in LORA_NAMES else inputs.weights
        norm = float(gradient.norm())
        if norm == 0:
            continue
        scale = float(tensor.double().norm()) or 1.0
        moved = (tensor.double() + gradient * (4 * scale / norm)).to(tensor.dtype)
        direction = moved.double() - tensor.double()
        there = changed(inputs, **{name: moved})
        output = trial.run(there)[OUTPUT].double()
        rise = float(((output - plain[OUTPUT].double()) * upstream).sum())
        slope = float((gradient * direction).sum())
        outputs = _may_err(trial.right, OUTPUT) + _may_err(Right.of(there), OUTPUT)
        allowed = outputs * float(upstream.norm()) + _may_err(trial.right, f"grad_{name}") * float(direction.norm())
        trial.compared += 1
        trial.believed += allowed < abs(slope)
        expect(
            abs(rise - slope) <= allowed,
            f"along grad_{name} the output rises by {rise:.3e}, by the gradient {slope:.3e}, budget {allowed:.1e}",
        )


def _may_err(right: Right, name: str) -> float:
    """The L2 distance from the right answer that an engine's tensor `name` may have."""
    norm = float(right.tensors[name].norm())
    return gates.budget(right.rounding(name)) * norm if norm else math.inf
