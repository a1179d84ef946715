"""Probes of calls: memory, the same call again, threads, what is left over, other layers, outstanding forwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose import calls
from ktverify.diagnose.evidence import Finding
from ktverify.diagnose.stand import BEHAVIOUR, Stand, certain, with_tokens
from ktverify.judge.metrics import compare
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import GRAD_NAMES, LORA_NAMES, OUTPUT

_CHANCE = 1e-2  # results that differ by less than this differ in the order of a sum, not in what is summed


def memory(stand: Stand) -> Iterator[Finding]:
    """Inputs and what lies behind them stay as they are, strides and odd addresses do not matter."""
    inputs = stand.inputs
    guards: list[tuple[str, Tensor, Tensor]] = []

    def guarded(name: str) -> Tensor:
        inner, buffer = calls.guarded(getattr(inputs, name))
        guards.append((name, buffer, buffer.clone()))
        return inner

    watched = with_tokens(inputs, guarded)
    expected = calls.run(stand.layer(inputs), watched)
    written = [name for name, buffer, before in guards if not torch.equal(buffer, before)]
    if written:
        yield certain(Cause.MEMORY_LAYOUT, f"the caller's {', '.join(written)}, or what lies beside, is written to")
        return
    for text, change in (("not contiguous", calls.strided), ("at odd addresses", calls.shifted)):
        found = stand.run(None, calls.everywhere(inputs, change))
        far = [n for n in calls.unequal(expected, found) if not _near(expected[n], found[n])]
        if far:
            yield certain(Cause.MEMORY_LAYOUT, f"inputs that are {text} change {calls.where(expected, found)}")
            return


def _near(left: Tensor, right: Tensor) -> bool:
    """Equal but for the order of a sum."""
    return left.shape == right.shape and compare(right, left.double()).rel_l2 < _CHANCE


def repeats(stand: Stand) -> Iterator[Finding]:
    """The same call on the same layer, and on a new one; the results of one are not overwritten by the next."""
    layer = stand.layer()
    kept = calls.run(layer, stand.inputs, copy=False)
    first = {name: tensor.clone() for name, tensor in kept.items()}
    stand.run(layer, stand.others(7))
    spoiled = calls.unequal(first, kept)
    if spoiled:
        yield certain(Cause.STALE_VALUES, f"a later call overwrites {', '.join(spoiled)} of an earlier one")
        return
    runs = [first, *(stand.run(layer) for _ in range(4))]
    odd = next((run for run in runs if calls.unequal(first, run)), None)
    new = stand.run()
    if calls.unequal(first, new):
        yield certain(Cause.THREADS, f"the same call on two new layers gives other bits: {calls.where(first, new)}")
    elif odd is not None:
        apart = max(compare(odd[name], first[name].double()).rel_l2 for name in calls.unequal(first, odd))
        if apart < _CHANCE:
            said = f"the same call gives other bits from time to time: {calls.where(first, odd)} (rel_l2 {apart:.1e})"
            yield certain(Cause.THREADS, said)
        else:
            said = f"the same call gives other numbers the second time: {calls.where(first, odd)} (rel_l2 {apart:.1e})"
            yield certain(Cause.STALE_VALUES, said)


def threads(stand: Stand) -> Iterator[Finding]:
    """One thread against two, three and sixteen."""
    one = stand.run(threads=1)
    for count in (2, 3, 16):
        other = stand.run(threads=count)
        if calls.unequal(one, other):
            yield certain(Cause.THREADS, f"1 and {count} threads give other bits: {calls.where(one, other)}")
            return


def left_over(stand: Stand) -> Iterator[Finding]:
    """Fewer tokens and other experts after a full call, against a new layer."""
    case, inputs = stand.case, stand.inputs
    layer = stand.layer()
    for rows, busy in ((case.qlen, case.num_experts - 1), (case.qlen // 2, case.num_experts), (1, 1), (case.qlen, 1)):
        batch = replace(inputs, expert_ids=inputs.expert_ids % busy)
        batch = with_tokens(batch, lambda name, b=batch, n=rows: getattr(b, name)[:n])  # type: ignore[misc]
        full = stand.run(layer)
        found, fresh = stand.run(layer, batch), stand.run(None, batch)
        odd = calls.unequal(fresh, found)
        if not odd:
            continue
        name = odd[0]
        idle = name in GRAD_NAMES and not bool(fresh[name][busy:].any()) and bool(found[name][busy:].any())
        what = f"{name} of idle experts is not zero" if idle else calls.where(fresh, found)
        same = fresh[name].shape == full[name].shape
        if same and torch.allclose((found[name] - fresh[name]).double(), full[name].double(), rtol=0.05):
            what += "; the difference is the last call's result"
        said = f"{rows} tokens on experts 0 to {busy - 1} after {case.qlen} tokens on all"
        yield certain(Cause.STALE_VALUES, f"values of the last call are left over: {what} ({said})")
        return


def reloaded(stand: Stand) -> Iterator[Finding]:
    """Other base weights and LoRA loaded into a layer that was used."""
    inputs, other = stand.inputs, make_inputs(stand.case.with_seed(stand.case.seed + 1))
    layer = stand.layer()
    stand.run(layer)
    layer.load_weights_from_tensors(other.gate_proj, other.up_proj, other.down_proj, other.physical_map)
    layer.init_lora_weights(*(other.lora[name].clone() for name in LORA_NAMES))
    mixed = with_tokens(other, lambda name: getattr(inputs, name))
    expected, found = stand.run(None, mixed), stand.run(layer, mixed)
    if calls.unequal(expected, found):
        said = f"weights that were loaded before are still used: {calls.where(expected, found)}"
        yield certain(Cause.STALE_VALUES, said)


def two_layers(stand: Stand) -> Iterator[Finding]:
    """Two layers, the forward of the second before the backward of the first."""
    case = BEHAVIOUR.with_seed(stand.case.seed + 3)
    inputs = make_inputs(case)
    expected = stand.run()
    layer = stand.layer()
    second = Stand(case, inputs, stand.probe).layer()
    output = _forward(layer, stand.inputs)
    _forward(second, inputs)
    found = calls.backward(layer, stand.inputs, output)
    if calls.unequal(expected, found):
        said = f"another layer's forward changes the gradients of this one: {calls.where(expected, found)}"
        yield certain(Cause.STALE_VALUES, said)


def evaluation(stand: Stand) -> Iterator[Finding]:
    """save_for_backward=False gives the output of save_for_backward=True."""
    saved = stand.run()[OUTPUT]
    plain = _forward(stand.layer(), stand.inputs, save=False)
    if not calls.same_bits(saved, plain):
        apart = compare(plain, saved.double()).rel_l2
        said = f"the output without save_for_backward is another: rel_l2 {apart:.1e} (is a dropout on?)"
        yield certain(Cause.OTHER, said)


def outstanding(stand: Stand) -> Iterator[Finding]:
    """Three forwards outstanding: backward takes the newest first; unsaved forwards, a cleared cache don't matter."""
    batches = [stand.inputs, stand.others(1), stand.others(2)]
    alone = [stand.run(None, batch) for batch in batches]
    for text, between in (
        ("", lambda layer: None),
        (", a forward that saves nothing before it,", lambda layer: _forward(layer, batches[0], save=False)),
        (", after clear_sft_buffer_cache,", lambda layer: layer.clear_sft_buffer_cache()),
    ):
        layer = stand.layer(max_cache_depth=3)
        for batch in batches:
            _forward(layer, batch)
        for index in (2, 1, 0):
            between(layer)
            try:
                found = calls.backward(layer, batches[index], alone[index][OUTPUT])
            except RuntimeError as error:
                yield certain(Cause.ORDER, f"with forwards outstanding{text} backward raises: {error}")
                return
            if calls.unequal(alone[index], found):
                got = [i for i in range(3) if not calls.unequal(alone[i], found, GRAD_NAMES)]
                which = f"gives those of forward {got[0]}" if got else f"is wrong: {calls.where(alone[index], found)}"
                said = f"with three forwards outstanding{text} the backward of forward {index} {which}"
                yield certain(Cause.ORDER, said)
                return


def _forward(layer: object, inputs: Inputs, *, save: bool = True) -> Tensor:
    output: Tensor = layer.forward_sft(  # type: ignore[attr-defined]
        inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=save
    )
    return output
