"""Probes of LoRA: which values are computed with, and when; many updates; the method that leaves LoRA out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose import calls
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.diagnose.formulas import Layer
from ktverify.diagnose.stand import BEHAVIOUR, Stand, certain
from ktverify.engines.run import METHOD
from ktverify.judge.metrics import compare
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import GRAD_NAMES, LORA_NAMES, OUTPUT

STEPS = (1, 2, 3, 4, 6, 10, 20, 35, 50)


def updates(stand: Stand) -> Iterator[Finding]:
    """LoRA changed without update_lora_weights, with it, again, with a bad one, and between forward and backward."""
    other = [make_inputs(stand.case.with_seed(stand.case.seed + step)).lora for step in (1, 2)]
    layer = stand.layer()
    before = stand.run(layer)
    _set(layer, other[0])
    early = stand.run(layer)
    if calls.unequal(before, early):
        said = "LoRA that was not handed over (no update_lora_weights) is used"
        yield certain(Cause.STALE_LORA, f"{said}: {calls.where(before, early)}")
        return
    held = stand.inputs.lora
    for step, lora in enumerate(other, start=1):
        _set(layer, lora)
        layer.update_lora_weights()
        found = stand.situation(replace(stand.inputs, lora=lora), stand.run(layer))
        if found.failing:
            yield stale(found, held, f"update {step}")
            return
        held = lora
    yield from _bad_update(stand, layer)
    yield from _between(stand, other[0])


def _set(layer: Any, lora: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name in LORA_NAMES:
            getattr(layer, name).copy_(lora[name])


def stale(situation: Situation, old: dict[str, Tensor], when: str) -> Finding:
    """Which of the six are still those of before: one after the other is put back where that lowers the error."""
    lora, error = dict(situation.inputs.lora), situation.error
    found: list[str] = []
    groups = (LORA_NAMES, LORA_NAMES[4:], LORA_NAMES[2:4], LORA_NAMES[:2], LORA_NAMES[::2], LORA_NAMES[1::2])
    for names in (*groups, *((name,) for name in LORA_NAMES)):
        tried = {**lora, **{name: old[name] for name in names}}
        left = sum(situation.left(Layer.of(replace(situation.inputs, lora=tried)).tensors).values())
        if left < 0.9 * error:
            lora, error, found = tried, left, [*found, *(name for name in names if name not in found)]
    share = 1 - error / situation.error
    if found and share > 0.5:
        which = "all six LoRA tensors" if len(found) == len(LORA_NAMES) else ", ".join(found)
        explained = f"explains {100 * share:.1f} % of the error after {when}"
        return certain(Cause.STALE_LORA, f"{which} are those of before the last update_lora_weights ({explained})")
    return certain(Cause.STALE_LORA, f"after {when} {', '.join(situation.failing)} are wrong")


def _bad_update(stand: Stand, layer: Any) -> Iterator[Finding]:
    """An update that meets one bad parameter takes none."""
    before = stand.run(layer)
    good = make_inputs(stand.case.with_seed(stand.case.seed + 5)).lora
    for name in LORA_NAMES[1:]:
        for each in LORA_NAMES:
            setattr(layer, each, good[each].clone())
        setattr(layer, name, good[name][:, :-1])
        refused = calls.refusal(layer.update_lora_weights)
        found = stand.run(layer)
        if refused is None:
            yield certain(Cause.REFUSAL, f"update_lora_weights accepts a {name} of another shape")
            return
        if calls.unequal(before, found):
            said = f"update_lora_weights refuses a bad {name}, and has taken some of the others"
            yield certain(Cause.STALE_LORA, f"{said}: {calls.where(before, found)}")
            return


def _between(stand: Stand, other: dict[str, Tensor]) -> Iterator[Finding]:
    expected, inputs = stand.run(), stand.inputs
    for call in ("a change of the parameters", "update_lora_weights"):
        layer = stand.layer()
        output = layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=True)
        _set(layer, other)
        if call == "update_lora_weights":
            layer.update_lora_weights()
        found = calls.backward(layer, inputs, output)
        if calls.unequal(expected, found):
            said = f"{call} between forward and backward changes the gradients"
            yield certain(Cause.STALE_LORA, f"{said}: {calls.where(expected, found)}")
            return


def many_updates(stand: Stand) -> Iterator[Finding]:
    """Fifty small updates of fp32 LoRA: a layer that had them all against a new one with the same parameters."""
    case = replace(BEHAVIOUR, lora_dtype="float32")
    stand = Stand.of(stand.probe, case)
    layer = stand.layer()
    stand.run(layer)
    lora = {name: tensor.clone() for name, tensor in stand.inputs.lora.items()}
    draw = torch.Generator().manual_seed(7)
    before = lora
    grown: list[tuple[int, float]] = []
    for step in range(1, STEPS[-1] + 1):
        before = lora
        lora = {
            name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=draw)
            for name, tensor in lora.items()
        }
        _set(layer, lora)
        layer.update_lora_weights()
        if step in STEPS:
            here = replace(stand.inputs, lora=lora)
            found, fresh = stand.run(layer, here), stand.run(None, here)
            odd = calls.unequal(fresh, found)
            grown.append((step, max((compare(found[n], fresh[n].double()).rel_l2 for n in odd), default=0.0)))
    if grown[-1][1] > 0:
        yield _grown(grown, stand, lora, before, layer)


def _grown(
    grown: list[tuple[int, float]], stand: Stand, lora: dict[str, Tensor], before: dict[str, Tensor], layer: Any
) -> Finding:
    """A distance that is there from the start and grows is a drift; one that comes and stays is an old value."""
    wrong = [(step, apart) for step, apart in grown if apart > 0]
    first, last = wrong[0], wrong[-1]
    told = ", ".join(f"{apart:.1e} after {step}" for step, apart in (first, wrong[len(wrong) // 2], last))
    slope = 0.0
    if len(wrong) > 2:
        slope = math.log(last[1] / first[1]) / math.log(last[0] / first[0])
    if slope > 0.3 and first[0] == grown[0][0]:
        said = f"the error grows with the updates, about as steps^{slope:.1f}: rel_l2 {told}"
        return certain(Cause.ACCUMULATION_TYPE, f"{said}; a running sum of a coarser type than fp32 does that")
    after = replace(stand.inputs, lora=lora)
    found = stale(stand.situation(after, stand.run(layer, after)), before, f"update {STEPS[-1]}")
    return replace(found, text=f"from update {first[0]} on: {found.text} (rel_l2 {told})")


def skip_lora(stand: Stand) -> Iterator[Finding]:
    """AMXBF16_SFT_SkipLoRA: the same output, LoRA gradients zero."""
    method = f"{METHOD}_SkipLoRA"
    full, found = stand.run(), stand.run(method=method)
    if not calls.same_bits(full[OUTPUT], found[OUTPUT]):
        yield certain(Cause.OTHER, f"{method}: the output is another than {METHOD}'s")
    elif any(bool(found[name].any()) for name in GRAD_NAMES):
        names = [name for name in GRAD_NAMES if bool(found[name].any())]
        yield certain(Cause.OTHER, f"{method}: {', '.join(names)} must be zero and are not")
