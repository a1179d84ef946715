"""Experts on another device: any mask gives the layer's results, whatever moves, waits, or has no slot on a side.

The device is "cpu", which stands in for a GPU through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import TOKENS, changed, rows_of
from ktverify.checks.causes import Cause
from ktverify.checks.check import Function, Where, check
from ktverify.checks.judging import NUMBERS, judged
from ktverify.checks.quantised_inputs import as_bf16, draw
from ktverify.checks.target import Target
from ktverify.engines.run import METHOD, backward_of, forward, layer_arguments, run_layer
from ktverify.errors import Unsupported
from ktverify.isolation.calls import CONSTRUCTOR, call_of
from ktverify.judge.dequantise import CODINGS
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS, BASE_NAMES, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

CASE = Case.parse("E=7,k=3,H=96,I=64,T=32,r=8,alpha=24,map=permuted")
ODD = Case.parse("E=7,k=3,H=97,I=47,T=19,r=3,alpha=5,lora=float32")
# int4 with groups of 32
CODES = Case.parse("E=7,k=3,H=160,I=96,T=19,r=3,alpha=5")
MASKS = {
    "none": (False,) * 7,
    "all": (True,) * 7,
    "one": (False, False, False, False, True, False, False),
    "every_second": (True, False, True, False, True, False, True),
    "scattered": (False, True, True, False, False, True, False),
}
HALF, OTHERS = MASKS["scattered"], tuple(not there for there in MASKS["scattered"])

Mask = Sequence[bool]
Tensors = dict[str, Tensor]


def _hybrid(contract: str, **more: Any) -> Callable[[Function], Function]:
    settings: dict[str, Any] = {"cause": Cause.OTHER_DEVICE, "where": Where.OWN_CHOICE, **more}
    return check("hybrid", contract, family="hybrid", **settings)


def _layer(target: Target, inputs: Inputs, mask: Mask = HALF, **more: Any) -> Any:
    """A layer with the weights and LoRA of `inputs`. Unsupported where the engine takes no mask."""
    layer = _bare(target, inputs, {"gpu_experts_mask": list(mask), **more})
    with call_of("load_weights_from_tensors"):
        layer.load_weights_from_tensors(*(inputs.slotted(name) for name in BASE_NAMES), inputs.physical_map)
    return _with_lora(layer, inputs)


def _bare(target: Target, inputs: Inputs, more: dict[str, Any]) -> Any:
    arguments = layer_arguments(inputs.case, **{**target.how, "gpu_device": "cpu", **more})
    with call_of(CONSTRUCTOR):
        try:
            layer = target.factory(**arguments)
        except TypeError as error:
            if any(name in str(error) for name in ("gpu_experts_mask", "gpu_device")):
                raise Unsupported(f"experts on another device: {error}") from error
            raise
    # a constructor with **more takes a mask and ignores it; its numbers are right
    if not callable(getattr(layer, "set_gpu_experts_mask", None)):
        raise Unsupported("experts on another device: the layer has no set_gpu_experts_mask")
    return layer


def _with_lora(layer: Any, inputs: Inputs) -> Any:
    with call_of("init_lora_weights"):
        layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
    return layer


def _move(layer: Any, mask: Mask) -> None:
    """Other experts on the device."""
    with call_of("set_gpu_experts_mask"):
        layer.set_gpu_experts_mask(list(mask))


def _step(layer: Any, inputs: Inputs) -> None:
    """Write the LoRA of `inputs` into the layer's parameters, as an optimizer's step does."""
    for name in LORA_NAMES:
        getattr(layer, name).detach().copy_(inputs.lora[name])


def _routed(inputs: Inputs, ids: Tensor) -> Inputs:
    """`inputs` with other expert ids [T, k]."""
    return changed(inputs, expert_ids=ids)


def _on_one_side(inputs: Inputs, mask: Mask, there: bool) -> Inputs:
    """`inputs` with every slot at an expert of one side of the mask, experts named twice among them."""
    side = torch.tensor([expert for expert, on in enumerate(mask) if on is there])
    return _routed(inputs, side[inputs.expert_ids % len(side)])


@_hybrid(
    "With every mask, all results keep the budget of a layer that computes all experts in one place.",
    gates=(*NUMBERS, "form"),
    variants={f"/{label}": {"label": label} for label in MASKS} | {"/odd_sizes": {"label": "scattered", "case": ODD}},
)
def check_masks(target: Target, label: str, case: Case = CASE) -> None:
    """All results of a layer with one mask beside the oracle."""
    inputs = make_inputs(case)
    judged(target, f"mask {label}", case, run_layer(_layer(target, inputs, MASKS[label]), inputs), inputs)


@_hybrid("A mask of no expert changes no bit, and num_gpu_experts=n is the mask of the first n.")
def check_count(target: Target) -> None:
    """The bits of a layer without a mask with an empty one; those of the mask of the first three for the number 3."""
    inputs = make_inputs(CASE)
    plain, empty = target.run(CASE, inputs), run_layer(_layer(target, inputs, MASKS["none"]), inputs)
    target.expect_same_bits("without a mask and with an empty one", plain, empty)
    first = _bare(target, inputs, {"num_gpu_experts": 3})
    first.load_weights_from_tensors(*(inputs.slotted(name) for name in BASE_NAMES), inputs.physical_map)
    expected = run_layer(_layer(target, inputs, [expert < 3 for expert in range(7)]), inputs)
    target.expect_same_bits("num_gpu_experts=3", expected, run_layer(_with_lora(first, inputs), inputs))


@_hybrid(
    "Every slot counts once, on the side of its expert: also two of a token that name the same one; one of −1 counts "
    "on neither.",
    gates=(*NUMBERS, "form"),
    variants={f"/{routing}": {"routing": routing} for routing in ("duplicate", "masked")},
)
def check_slots(target: Target, routing: str) -> None:
    """All results beside the oracle, of experts named twice and of slots of -1, with each mask of half the experts."""
    case = replace(CASE, routing=routing)
    inputs = make_inputs(case)
    for mask in (HALF, OTHERS):
        judged(target, f"{routing} slots, mask {mask}", case, run_layer(_layer(target, inputs, mask), inputs), inputs)


@_hybrid(
    "Routing weights and s are multiplied in once on each side.",
    gates=(*NUMBERS, "form"),
    variants={f"/{label}": {"mask": mask} for label, mask in (("device", MASKS["all"]), ("both", HALF))},
)
def check_scaling(target: Target, mask: Mask) -> None:
    """All results beside the oracle, with routing weights that a model's factor of 2.5 has scaled, and s = 3."""
    inputs = make_inputs(CASE)
    scaled = changed(inputs, weights=inputs.weights * 2.5)
    judged(target, "routing weights times 2.5", CASE, run_layer(_layer(target, scaled, mask), scaled), scaled)


@_hybrid(
    "A side without a slot computes nothing and raises nothing; nor do both with T = 0.",
    gates=(*NUMBERS, "form", "bits"),
)
def check_empty_side(target: Target) -> None:
    """Slots at one side alone, on neither, and no token: right results, and the ordinary call's bits after each."""
    inputs = make_inputs(CASE)
    layer = _layer(target, inputs)
    before = run_layer(layer, inputs)
    nowhere = torch.full_like(inputs.expert_ids, -1)
    few = rows_of(inputs, slice(0))
    for what, batch in (
        ("all slots on the device", _on_one_side(inputs, HALF, True)),
        ("no slot on the device", _on_one_side(inputs, HALF, False)),
    ):
        judged(target, what, CASE, run_layer(layer, batch), batch)
        target.expect_same_bits(f"after a call with {what}", before, run_layer(layer, inputs))
    for what, batch in (("slots of -1 alone", _routed(inputs, nowhere)), ("no token", few)):
        found = run_layer(layer, batch)
        odd = [name for name in ALL_TENSORS if bool(found[name].any())]
        target.expect(not odd, f"{what}: {', '.join(odd)} must be zero", "stray")
        target.expect_same_bits(f"after a call with {what}", before, run_layer(layer, inputs))


@_hybrid(
    "An expert without a token has gradients of exactly 0, never None, on both sides.",
    gates=("stray", "bits"),
)
def check_idle_experts(target: Target) -> None:
    """Zero gradients of experts without a token, of either side and of a whole side, after a call that reached all."""
    inputs = make_inputs(CASE)
    layer = _layer(target, inputs)
    run_layer(layer, inputs)
    for busy in ((0, 1), (3, 4), (1, 2)):
        ids = torch.tensor(busy)[inputs.expert_ids % 2]
        found = run_layer(layer, _routed(inputs, ids))
        for name in GRAD_NAMES:
            reached = found[name].flatten(1).any(1).nonzero().flatten().tolist()
            strays = sorted(set(reached) - set(busy))
            target.expect(not strays, f"tokens of experts {busy} alone: {name} of experts {strays} is not 0", "stray")


@_hybrid("update_lora_weights reaches both sides; until then both compute with the values of the last update.")
def check_update(target: Target) -> None:
    """After a step: the old bits; after the update: those of a new layer with the new values; by init as well."""
    inputs, other = make_inputs(CASE), make_inputs(CASE.with_seed(6))
    stepped = changed(inputs, **other.lora)
    for mask in (HALF, MASKS["all"]):
        layer = _layer(target, inputs, mask)
        before = {name: tensor.clone() for name, tensor in run_layer(layer, inputs).items()}
        _step(layer, other)
        target.expect_same_bits("stepped, without an update", before, run_layer(layer, inputs))
        layer.update_lora_weights()
        after = run_layer(_layer(target, stepped, mask), inputs)
        target.expect_same_bits("after update_lora_weights", after, run_layer(layer, inputs))
        target.expect_same_bits("after init_lora_weights", before, run_layer(_with_lora(layer, inputs), inputs))


@_hybrid("Every waiting forward keeps its slots, weights and LoRA of both sides until its own backward.")
def check_waiting_forwards(target: Target) -> None:
    """Three forwards, an update and an unsaved forward between them: each backward, newest first, as alone."""
    inputs, other = make_inputs(CASE), make_inputs(CASE.with_seed(6))
    batches = []
    for seed, rows in ((1, 32), (2, 5), (3, 32)):
        drawn = make_inputs(CASE.with_seed(seed))
        batches.append(changed(inputs, **{name: getattr(drawn, name)[:rows] for name in TOKENS}))
    # the second has no slot on the device
    batches[1] = _on_one_side(batches[1], HALF, False)
    alone = [run_layer(_layer(target, inputs), batch) for batch in batches]
    layer = _layer(target, inputs, max_cache_depth=3)
    outputs = [forward(layer, batch, save=True) for batch in batches]
    _step(layer, other)
    layer.update_lora_weights()
    forward(layer, inputs, save=False)
    for number in (2, 1, 0):
        found = {OUTPUT: outputs[number], **backward_of(layer, batches[number])}
        target.expect_same_bits(f"forward {number + 1} of three, after an update", alone[number], found)


@_hybrid(
    "set_gpu_experts_mask(mask) moves experts between the sides at any time, and takes the LoRA parameters over: the "
    "layer then has the bits of a new one with that mask."
)
def check_moved(target: Target) -> None:
    """A training whose mask changes after every step: each time the bits of a new layer, as far as back to none."""
    inputs = make_inputs(CASE)
    layer = _layer(target, inputs, MASKS["one"])
    for seed, label in enumerate(("scattered", "all", "every_second", "none", "one")):
        run_layer(layer, inputs)
        stepped = changed(inputs, **make_inputs(CASE.with_seed(seed)).lora)
        _step(layer, stepped)
        _move(layer, MASKS[label])
        expected = run_layer(_layer(target, stepped, MASKS[label]), inputs)
        target.expect_same_bits(f"moved to the mask {label}", expected, run_layer(layer, inputs))


@_hybrid("A forward that waits has its backward on the sides that computed it.")
def check_moved_while_waiting(target: Target) -> None:
    """Experts move in both directions between a forward and its backward, which has the bits of no move."""
    inputs = make_inputs(CASE)
    for before, after in ((HALF, OTHERS), (MASKS["none"], MASKS["all"]), (MASKS["all"], MASKS["none"])):
        expected = run_layer(_layer(target, inputs, before), inputs)
        layer = _layer(target, inputs, before)
        output = forward(layer, inputs, save=True)
        _move(layer, after)
        target.expect_same_bits("moved while it waits", expected, {OUTPUT: output, **backward_of(layer, inputs)})


@_hybrid("The same call has the same bits.", variants={"": {}, "_at_odd_sizes": {"case": ODD}})
def check_repeats(target: Target, case: Case = CASE) -> None:
    """Again, on a new layer, and with other numbers of threads."""
    inputs = make_inputs(case)
    layer = _layer(target, inputs)
    first = {name: tensor.clone() for name, tensor in run_layer(layer, inputs).items()}
    target.expect_same_bits("the same layer again", first, run_layer(layer, inputs))
    for threads in (1, 3):
        found = run_layer(_layer(target, inputs, cpuinfer_threads=threads), inputs)
        target.expect_same_bits(f"a new layer, {threads} threads", first, found)


@_hybrid(
    "SkipLoRA and quantised methods have sides as well; the device computes with the weights W of its codes.",
    gates=(*NUMBERS, "form", "bits"),
)
def check_methods(target: Target) -> None:
    """SkipLoRA: the same output and routing gradient, LoRA gradients of 0. Codes: the bits of W under the same mask."""
    inputs = make_inputs(CASE)
    full = run_layer(_layer(target, inputs), inputs)
    found = run_layer(_layer(target, inputs, method=f"{METHOD}_SkipLoRA"), inputs)
    target.expect_same_bits("SkipLoRA", full, found, (OUTPUT,))
    judged(target, "SkipLoRA", CASE, {name: found[name] for name in (OUTPUT, GRAD_WEIGHTS)}, inputs)
    odd = [name for name in GRAD_NAMES if bool(found[name].any())]
    target.expect(not odd, f"SkipLoRA: {', '.join(odd)} must be zero", "bits")
    coding = CODINGS["int4_32"]
    coded, inputs = draw(coding, CODES), make_inputs(CODES)
    expected = run_layer(_layer(target, as_bf16(coded, inputs)), inputs)
    layer = _bare(target, inputs, {"gpu_experts_mask": list(HALF), "method": coding.method})
    layer.load_weights_from_tensors(**coded.arguments(inputs.physical_map))
    target.expect_same_bits("codes and W", expected, run_layer(_with_lora(layer, inputs), inputs))
