"""Which tensor an engine goes on with after the caller changed it: one tensor is changed at a time.

Each way of handing over new values is tried: update_lora_weights after a step in place or with new tensors, a second
init_lora_weights or load_weights_from_tensors, and another layer of the same process. A tensor is stale for certain
where a new layer that gets the old values returns the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.target import Target, same_bits
from ktverify.diagnose.asking import Fault
from ktverify.diagnose.evidence import Evidence, Explanation, same_words, stated
from ktverify.diagnose.formulas import LayerValues
from ktverify.diagnose.hypotheses.operands import stale_in_a_half
from ktverify.diagnose.search import one_thread
from ktverify.engines.run import run_layer
from ktverify.errors import EngineDied, EngineTimeout
from ktverify.isolation.calls import ENGINE_EXCEPTIONS
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

# bf16 LoRA, then what is stale with fp32 LoRA only
_CASES = tuple(Case.parse(f"E=4,k=2,H=64,I=64,T=24,r=4,alpha=8,lora={dtype}") for dtype in ("bfloat16", "float32"))
_SURE = 0.95  # share of the error that the old values must explain, where bits cannot show it

Change = Callable[[Any, str, Inputs], None]
# what one tensor showed: (proof or "", name, text)
_Shown = tuple[str, str, str]


@dataclass(frozen=True)
class Way:
    """One way of handing over new values. when: how a text names it. names: the tensors. change: a layer, the name of
    the tensor that is new, and all present values -> the calls."""

    when: str
    names: tuple[str, ...]
    change: Change


def _in_place(layer: Any, name: str, now: Inputs) -> None:
    with torch.no_grad():
        getattr(layer, name).copy_(now.lora[name])
    layer.update_lora_weights()


def _new_tensor(layer: Any, name: str, now: Inputs) -> None:
    setattr(layer, name, now.lora[name].clone())
    layer.update_lora_weights()


def _init(layer: Any, name: str, now: Inputs) -> None:
    layer.init_lora_weights(*(now.lora[each].clone() for each in LORA_NAMES))


def _load(layer: Any, name: str, now: Inputs) -> None:
    layer.load_weights_from_tensors(*(now.slotted(each) for each in BASE_NAMES), now.physical_map)
    _init(layer, name, now)


WAYS = (
    Way("after update_lora_weights", LORA_NAMES, _in_place),
    Way("after update_lora_weights with a new tensor", LORA_NAMES, _new_tensor),
    Way("after a second init_lora_weights", LORA_NAMES, _init),
    Way("after a second load_weights_from_tensors", BASE_NAMES, _load),
)


def stale_values(target: Target) -> list[Explanation]:
    """A finding for each way after which tensors are stale, and one for values of another layer. In this process.

    None where the engine does not compute a first call: other findings say why.
    """
    found: list[Explanation] = []
    known: set[str] = set()
    with one_thread():
        for case in _CASES:
            inputs = [make_inputs(case.with_seed(seed)) for seed in range(3)]
            try:
                # of an engine whose numbers are wrong by themselves only equal bits show something
                trusted = not Evidence.of(inputs[0], _run(target, inputs[0]), target).failing
                if trusted and not found and (of_another := _of_another_layer(target, inputs)):
                    return of_another
            except ENGINE_EXCEPTIONS:
                return found
            for way in WAYS:
                shown, died = _of_way(target, way, [name for name in way.names if name not in known], inputs, trusted)
                known.update(name for _, name, _ in shown)
                found += _merged(way.when if case is _CASES[0] else f"{way.when} of fp32 LoRA", shown)
                if died is not None:
                    fault = Fault.died(died)
                    if not any(same_words(fault.text, each.text) for each in found):
                        proof = f"a call {way.when} shows it"
                        found.append(stated(Cause.CRASH, fault.text, *fault.words, proof=proof))
                    if isinstance(died, EngineTimeout):
                        return found
    return found


def _of_way(
    target: Target, way: Way, names: Sequence[str], inputs: list[Inputs], trusted: bool
) -> tuple[list[_Shown], EngineDied | None]:
    """What each tensor shows, up to the one at which the engine's process ended."""
    shown: list[_Shown] = []
    for name in names:
        try:
            found = _stale(target, way, name, inputs, trusted)
        except EngineDied as died:
            return shown, died
        shown += [found] if found is not None else []
    return shown, None


def _run(target: Target, inputs: Inputs) -> dict[str, Tensor]:
    """ALL_TENSORS of a new layer."""
    return _copied(target.run(inputs.case, inputs))


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # an engine may return the same memory again
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return all(same_bits(left[name], right[name]) for name in left)


def with_tensor(inputs: Inputs, name: str, tensor: Tensor) -> Inputs:
    """The inputs with another LoRA or base tensor of that name."""
    if name in LORA_NAMES:
        return replace(inputs, lora={**inputs.lora, name: tensor})
    found = replace(inputs)
    setattr(found, name, tensor)
    return found


def _tensor(inputs: Inputs, name: str) -> Tensor:
    tensor: Tensor = inputs.lora[name] if name in LORA_NAMES else getattr(inputs, name)
    return tensor


def _stale(target: Target, way: Way, name: str, inputs: list[Inputs], trusted: bool) -> _Shown | None:
    """What two changes of one tensor show; None where the engine takes both over, or refuses this way. EngineDied."""
    try:
        layer = target.layer(inputs[0].case, inputs[0])
        before = [inputs[0]]
        first = _copied(run_layer(layer, inputs[0]))
        # the second call and the change alone must change nothing
        way.change(layer, name, inputs[0])
        quiet = _same(first, _copied(run_layer(layer, inputs[0])))
        for other in inputs[1:]:
            now = with_tensor(inputs[0], name, _tensor(other, name))
            way.change(layer, name, now)
            result = _copied(run_layer(layer, now))
            if not _same(result, _run(target, now)):
                return _shown(target, name, now, before, result, trusted and quiet)
            before.append(now)
    except EngineDied:
        raise
    except ENGINE_EXCEPTIONS:
        # the checks report it
        return None
    return None


def _shown(
    target: Target, name: str, now: Inputs, before: list[Inputs], result: dict[str, Tensor], trusted: bool
) -> _Shown | None:
    for old in reversed(before):
        if _same(result, _run(target, with_tensor(now, name, _tensor(old, name)))):
            return f"a new layer that gets the old {name} returns the same bits", name, ""
    evidence = Evidence.of(now, result, target)
    if not trusted or not evidence.failing:
        return None
    for old in reversed(before):
        for half, explained in stale_in_a_half(evidence, name, _tensor(old, name)):
            if explained.share > _SURE and explained.complete:
                return f"with the old {name}{half} the formulas give these tensors ({explained.share:.1%})", name, half
    return "", name, " in part"


def _merged(when: str, shown: list[_Shown]) -> list[Explanation]:
    """One finding for all tensors that are stale alike."""
    found = []
    for part in dict.fromkeys(part for _, _, part in shown):
        names = [name for _, name, text in shown if text == part]
        proofs = [proof for proof, _, text in shown if text == part]
        whole = {LORA_NAMES: "all six LoRA tensors", BASE_NAMES: "the base weights, all three,"}
        which = whole.get(tuple(names), ", ".join(names))
        verb = "is" if len(names) == 1 else "are"
        cause = Cause.STALE_LORA if names[0] in LORA_NAMES else Cause.STALE_VALUES
        text = f"{which} {verb} stale{part} {when}: the engine goes on with the values of before"
        proof = proofs[0] if len(names) == 1 else "new layers that get the old values return the same bits"
        found.append(stated(cause, text, proof=proof if all(proofs) else ""))
    return found


def _of_another_layer(target: Target, inputs: list[Inputs]) -> list[Explanation]:
    """The tensors of a first layer that a second one of this process computes with."""
    first, second = inputs[0], inputs[1]
    layer = target.layer(first.case, first)
    run_layer(layer, first)
    evidence = Evidence.of(second, _run(target, second), target)
    if not evidence.failing:
        return []
    here, names, error, predicted = second, [], evidence.error, evidence.right
    for name in (*BASE_NAMES, *LORA_NAMES):
        tried = with_tensor(here, name, _tensor(first, name))
        tensors = LayerValues.of(tried).tensors
        left = sum(evidence.left(tensors).values())
        if left < 0.9 * error:
            here, error, predicted = tried, left, tensors
            names.append(name)
    explained = evidence.explanation(Cause.STALE_VALUES, ", ".join(names), predicted)
    if not names or explained.share < _SURE or not explained.complete:
        return []
    proof = f"with these values the formulas give what the call returned ({explained.share:.1%})"
    cause = Cause.STALE_VALUES if set(names) & set(BASE_NAMES) else Cause.STALE_LORA
    return [stated(cause, f"a second layer computes with {', '.join(names)} of an earlier one", proof=proof)]
