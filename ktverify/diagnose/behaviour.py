"""What the tensors of one call cannot show: a few further calls of the engine, each with what CONTRACT.md says of it.

Comes in: a Situation and a Probe. Goes out: findings; the first kind of call that goes wrong ends the search. What an
engine raises where it must not is a finding too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktverify.cases import Case
from ktverify.data import Inputs, make_inputs
from ktverify.diagnose import calls, siblings
from ktverify.diagnose.causes import Cause
from ktverify.diagnose.situation import Finding, Probe, Situation, Tensors
from ktverify.names import ALL_TENSORS, GRAD_NAMES, LORA_NAMES, OUTPUT, TOKEN_TENSORS
from ktverify.reference import forward_backward
from ktverify.running import build_layer

Tried = Iterator[Finding]
TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")


@dataclass
class Stand:
    """What the probes work with: a small case that the engine is asked about, and how to ask."""

    case: Case
    inputs: Inputs
    probe: Probe

    def layer(self, inputs: Inputs | None = None, **more: Any) -> Any:
        """A loaded layer; LoRA and base weights are those of `inputs`."""
        given = {"isa": self.probe.isa, "tp": self.probe.tp, "threads": self.probe.threads, **more}
        return build_layer(self.probe.factory, self.case, inputs or self.inputs, **given)

    def run(self, layer: Any = None, inputs: Inputs | None = None, **more: Any) -> dict[str, Tensor]:
        """Copies of ALL_TENSORS of one forward and backward; of a new layer where none is given."""
        inputs = inputs or self.inputs
        return calls.run(self.layer(inputs, **more) if layer is None else layer, inputs)


def certain(cause: Cause, text: str, *evidence: str, rank: int = 1) -> Finding:
    """What a call has shown; there is nothing to fit."""
    return Finding(cause, text, 1.0, -1.0, complete=True, rank=rank, evidence=evidence)


def examine(situation: Situation, probe: Probe) -> tuple[list[Finding], int]:
    """(findings, how many kinds of call were tried)."""
    stand = Stand(situation.case, situation.inputs, probe)
    tried = 0
    for text, cause, look in PROBES:
        if time.monotonic() > situation.deadline:
            break
        tried += 1
        try:
            found = list(look(stand, situation))
        except Exception as error:  # an engine that raises where the contract has a result
            found = [certain(cause, f"{text}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")]
        if found:
            return found, tried
    return [], tried


# ---- the same call again


def repeats(stand: Stand, situation: Situation) -> Tried:
    """The same call on the same layer, and on a new one."""
    layer = stand.layer()
    first, again, new = stand.run(layer), stand.run(layer), stand.run()
    odd = calls.unequal(first, again)
    if calls.unequal(first, new):
        steady = not calls.unequal(stand.run(threads=1), stand.run(threads=1))
        where = calls.where(first, new)
        more = "; with one thread it repeats" if steady else ""
        yield certain(Cause.THREADS, f"the same call on two new layers gives other bits: {where}{more}")
    elif odd:
        yield certain(Cause.STALE_VALUES, f"the second call of a layer gives other bits: {calls.where(first, again)}")


def threads(stand: Stand, situation: Situation) -> Tried:
    """One thread against two, three and sixteen."""
    one = stand.run(threads=1)
    for count in (2, 3, 16):
        other = stand.run(threads=count)
        if calls.unequal(one, other):
            yield certain(Cause.THREADS, f"1 and {count} threads give other bits: {calls.where(one, other)}")
            return


def left_over(stand: Stand, situation: Situation) -> Tried:
    """Fewer tokens and other experts after a full call, against a new layer."""
    case, inputs = stand.case, stand.inputs
    if case.qlen < 2:
        return
    layer = stand.layer()
    for rows, busy in ((case.qlen, case.num_experts - 1), (case.qlen // 2, case.num_experts), (1, 1), (case.qlen, 1)):
        ids = torch.where(inputs.expert_ids >= 0, inputs.expert_ids % max(busy, 1), inputs.expert_ids)
        batch = replace(inputs, expert_ids=ids)
        batch = replace(batch, **{name: getattr(batch, name)[:rows] for name in TOKENS})
        full = stand.run(layer)
        found, fresh = stand.run(layer, batch), stand.run(None, batch)
        odd = calls.unequal(fresh, found)
        if not odd:
            continue
        said = f"{rows} tokens on experts 0 to {busy - 1} after {case.qlen} tokens on all"
        name = odd[0]
        idle = name in GRAD_NAMES and not bool(fresh[name][busy:].any()) and bool(found[name][busy:].any())
        what = f"{name} of idle experts is not zero" if idle else calls.where(fresh, found)
        added = _is_added(fresh[name], found[name], full[name])
        yield certain(Cause.STALE_VALUES, f"values of the last call are left over: {what}", said + added)
        return


def _is_added(fresh: Tensor, found: Tensor, before: Tensor) -> str:
    if fresh.shape == before.shape and torch.allclose((found - fresh).double(), before.double(), rtol=0.05):
        return "; the difference is the last call's result"
    return ""


# ---- LoRA and its updates


def updates(stand: Stand, situation: Situation) -> Tried:
    """LoRA changed without update_lora_weights, with it, three and three, and between forward and backward."""
    other = make_inputs(stand.case.with_seed(stand.case.seed + 1)).lora
    layer = stand.layer()
    before = stand.run(layer)
    with torch.no_grad():
        for name in LORA_NAMES:
            getattr(layer, name).copy_(other[name])
    early = stand.run(layer)
    if calls.unequal(before, early):
        said = "LoRA that was not handed over (no update_lora_weights) is used"
        yield certain(Cause.STALE_LORA, f"{said}: {calls.where(before, early)}")
        return
    layer.update_lora_weights()
    after = replace(stand.inputs, lora=other)
    found = Situation.of(stand.case, after, stand.run(layer), probe=stand.probe)
    if found.failing:
        yield _stale(found, stand.inputs.lora)
        return
    yield from _between(stand, other)


def _stale(situation: Situation, old: dict[str, Tensor]) -> Finding:
    """Which of the six are still those of before: one after the other is put back where that lowers the error."""
    from ktverify.diagnose.stages import Layer

    lora, error, stale = dict(situation.inputs.lora), situation.error, []
    groups = (LORA_NAMES, LORA_NAMES[4:], LORA_NAMES[2:4], LORA_NAMES[:2], LORA_NAMES[::2], LORA_NAMES[1::2])
    for names in (*groups, *((name,) for name in LORA_NAMES)):
        tried = {**lora, **{name: old[name] for name in names}}
        left = sum(situation.left(Layer.of(replace(situation.inputs, lora=tried)).tensors).values())
        if left < 0.9 * error:
            lora, error, stale = tried, left, [*stale, *(name for name in names if name not in stale)]
    share = 1 - error / situation.error
    if stale and share > 0.5:
        which = "all six" if len(stale) == 6 else ", ".join(stale)
        rest = f"explains {share:.1%} of the error after an update".replace("%", " %")
        return certain(Cause.STALE_LORA, f"{which} are those of before the last update_lora_weights ({rest})")
    return certain(Cause.STALE_LORA, f"after update_lora_weights {', '.join(situation.failing)} are wrong")


def _between(stand: Stand, other: dict[str, Tensor]) -> Tried:
    expected = stand.run()
    for hand_over in (False, True):
        layer = stand.layer()
        inputs = stand.inputs
        output = layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=True)
        with torch.no_grad():
            for name in LORA_NAMES:
                getattr(layer, name).copy_(other[name])
        if hand_over:
            layer.update_lora_weights()
        found = calls.backward(layer, inputs, output)
        if calls.unequal(expected, found):
            call = "update_lora_weights" if hand_over else "a change of the parameters"
            said = f"{call} between forward and backward changes the gradients"
            yield certain(Cause.STALE_LORA, f"{said}: {calls.where(expected, found)}")
            return


# ---- outstanding forwards, memory, non-finite tokens


def outstanding(stand: Stand, situation: Situation) -> Tried:
    """Three forwards outstanding, backward takes the newest first."""
    batches = [make_inputs(stand.case.with_seed(stand.case.seed + step)) for step in (0, 1, 2)]
    batches = [replace(stand.inputs, **{name: getattr(batch, name) for name in TOKENS}) for batch in batches]
    alone = [stand.run(None, batch) for batch in batches]
    layer = stand.layer(max_cache_depth=3)
    outputs = [layer.forward_sft(b.hidden_states, b.expert_ids, b.weights, save_for_backward=True) for b in batches]
    for index in (2, 1, 0):
        found = calls.backward(layer, batches[index], outputs[index])
        if calls.unequal(alone[index], found):
            got = [i for i in range(3) if not calls.unequal(alone[i], found, GRAD_NAMES)]
            which = f" gives those of forward {got[0]}" if got else f" is wrong: {calls.where(alone[index], found)}"
            yield certain(Cause.ORDER, f"with three forwards outstanding the backward of forward {index}{which}")
            return


def memory(stand: Stand, situation: Situation) -> Tried:
    """Inputs stay as they are, results are not overwritten, strides and odd addresses do not matter."""
    inputs = stand.inputs
    expected = stand.run()
    kept = {name: getattr(inputs, name).clone() for name in TOKENS}
    layer = stand.layer()
    first = calls.run(layer, inputs, copy=False)
    before = {name: tensor.clone() for name, tensor in first.items()}
    written = [name for name in TOKENS if not calls.same_bits(kept[name], getattr(inputs, name))]
    for name in written:
        getattr(inputs, name).copy_(kept[name])
    if written:
        yield certain(Cause.MEMORY_LAYOUT, f"the caller's {', '.join(written)} is written to")
        return
    stand.run(layer, make_other(stand))
    spoiled = calls.unequal(before, first)
    if spoiled:
        yield certain(Cause.MEMORY_LAYOUT, f"a later call overwrites {', '.join(spoiled)} of an earlier one")
        return
    for text, change in (("non-contiguous", calls.strided), ("at odd addresses", calls.shifted)):
        given = calls.everywhere(inputs, change)
        found = stand.run(None, given)
        if calls.unequal(expected, found):
            yield certain(Cause.MEMORY_LAYOUT, f"tensors that are {text} change {calls.where(expected, found)}")
            return


def make_other(stand: Stand) -> Inputs:
    """Other tokens for the same layer."""
    drawn = make_inputs(stand.case.with_seed(stand.case.seed + 7))
    return replace(stand.inputs, **{name: getattr(drawn, name) for name in TOKENS})


def non_finite(stand: Stand, situation: Situation) -> Tried:
    """A NaN in one token's row reaches that token and its experts' gradients, and nothing else."""
    inputs = stand.inputs
    if len(inputs.hidden_states) < 2:
        return
    clean = stand.run()
    token = len(inputs.hidden_states) // 2
    hit = set(inputs.expert_ids[token].tolist())
    spared = [expert for expert in range(stand.case.num_experts) if expert not in hit]
    others = [row for row in range(len(inputs.hidden_states)) if row != token]
    for value in (float("nan"), float("inf")):
        for name in ("hidden_states", "grad_output"):
            broken = getattr(inputs, name).clone()
            broken[token, 1] = value
            layer = stand.layer()
            given = replace(inputs, **{name: broken})
            found = stand.run(layer, given)
            what = f"{value} in {name}[{token}, 1]"
            for tensor in ALL_TENSORS:
                keep = others if tensor in TOKEN_TENSORS else spared
                if not calls.same_bits(clean[tensor][keep], found[tensor][keep]):
                    side = "other rows of" if tensor in TOKEN_TENSORS else "other experts'"
                    yield certain(Cause.NON_FINITE, f"{what} reaches {side} {tensor}")
                    return
            shown = OUTPUT if name == "hidden_states" else "grad_input"
            if bool(torch.isfinite(found[shown][token]).all()):
                yield certain(Cause.NON_FINITE, f"{what} is hidden: {shown}[{token}] is finite")
                return
            after = stand.run(layer)
            if calls.unequal(clean, after):
                yield certain(Cause.STALE_VALUES, f"{what} is left over in the next call: {calls.where(clean, after)}")
                return


# ---- ids, tensor parallelism, steps


def ids(stand: Stand, situation: Situation) -> Tried:
    """-1 contributes nothing whatever its weight is; an id that is none is refused."""
    inputs = stand.inputs
    if stand.case.qlen < 2:
        return
    holes = inputs.expert_ids.clone()
    holes[::2, -1] = -1
    masked = replace(inputs, expert_ids=holes)
    situation = Situation.of(stand.case, masked, stand.run(None, masked), probe=stand.probe)
    if situation.failing:
        yield from siblings.best(situation, Cause.IDS, "ids of -1 in the last slot of every other token")
        return
    for value in (float("nan"), 1e30):
        weights = torch.where(holes < 0, torch.tensor(value), inputs.weights)
        found = stand.run(None, replace(masked, weights=weights))
        if calls.unequal(stand.run(None, masked), found):
            yield certain(Cause.IDS, f"the weight of a slot with id -1 matters: {value} changes the result")
            return
    for bad in (stand.case.num_experts, -2):
        wrong = inputs.expert_ids.clone()
        wrong[0, 0] = bad
        refused = calls.refusal(lambda wrong=wrong: stand.run(None, replace(inputs, expert_ids=wrong)))  # type: ignore[misc]
        if refused is None:
            yield certain(Cause.IDS, f"expert id {bad} of {stand.case.num_experts} experts is accepted")
            return


def tensor_parallel(stand: Stand, situation: Situation) -> Tried:
    """Every degree that divides I, against the oracle."""
    for degree in (2, 3, 4, 5, 7):
        if stand.case.intermediate % degree == 0 and degree != stand.probe.tp:
            probe = replace(stand.probe, tp=degree)
            found = Situation.of(stand.case, stand.inputs, probe.run(stand.case, stand.inputs), probe=probe)
            if found.failing:
                yield from siblings.best(found, Cause.TP_PART, f"TP {degree}")
                return


def steps(stand: Stand, situation: Situation) -> Tried:
    """Sixty calls with updates in between, the parameters unchanged: the last is as good as the first."""
    layer = stand.layer()
    first = stand.run(layer)
    for step in range(1, 61):
        layer.update_lora_weights()
        if step in (2, 20, 60):
            found = stand.run(layer)
            if calls.unequal(first, found):
                grown = calls.distance(first, found)
                yield certain(Cause.STALE_LORA, f"after {step} updates with unchanged parameters: {grown}")
                return
        else:
            calls.run(layer, stand.inputs, copy=False)


def refusals(stand: Stand, situation: Situation) -> Tried:
    """What CONTRACT.md section 4 has refused: a few of each kind."""
    accepted = [text for text, act in calls.bad_calls(stand.case, stand.inputs, stand.layer, stand.probe.factory) if calls.refusal(act) is None]
    if accepted:
        yield certain(Cause.REFUSAL, f"not refused: {'; '.join(accepted)}")


Look = Callable[[Stand, Situation], Tried]
PROBES: tuple[tuple[str, Cause, Look], ...] = (
    ("the same call again", Cause.STALE_VALUES, repeats),
    ("another number of threads", Cause.THREADS, threads),
    ("fewer tokens after more", Cause.STALE_VALUES, left_over),
    ("update_lora_weights", Cause.STALE_LORA, updates),
    ("three outstanding forwards", Cause.ORDER, outstanding),
    ("tensor parallelism", Cause.TP_PART, tensor_parallel),
    ("memory", Cause.MEMORY_LAYOUT, memory),
    ("a NaN in one row", Cause.NON_FINITE, non_finite),
    ("ids", Cause.IDS, ids),
    ("other cases", Cause.OTHER, siblings.others),
    ("sixty steps", Cause.STALE_LORA, steps),
    ("refusals", Cause.REFUSAL, refusals),
)
__all__ = ["PROBES", "Stand", "Tensors", "certain", "examine"]
