"""Edge inputs: odd sizes, masked slots, strides, odd addresses, outliers, NaN, idle experts, permuted slots."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import at_offset, changed, everywhere
from ktverify.checks.causes import Cause
from ktverify.checks.check import Check, check, enter
from ktverify.checks.judging import ALONE, NUMBERS, SAME_BITS, judged
from ktverify.checks.target import MIDDLE, ODD_MIDDLE, SMALL, Target, expect, same_bits
from ktverify.engines.run import run_layer
from ktverify.isolation.hosted import written
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

EDGES = {
    "no_token": "E=4,k=2,H=64,I=32,T=0,r=4,alpha=8",
    "one_token": "E=4,k=2,H=64,I=32,T=1,r=4,alpha=8",
    "multiples_of_nothing": "E=5,k=3,H=97,I=47,T=7,r=3,alpha=5",
    "multiples_of_nothing_many_rows": "E=3,k=2,H=97,I=47,T=71,r=3,alpha=5,lora=float32",
    "sizes_of_one": "E=1,k=1,H=1,I=1,T=1,r=1,alpha=1",
    "rank_above_sizes": "E=2,k=1,H=17,I=5,T=3,r=64,alpha=64",
    "one_expert_has_all": "E=6,k=2,H=96,I=64,T=50,r=8,alpha=16,routing=one_expert",
    "expert_named_twice": "E=4,k=3,H=64,I=128,T=11,r=4,alpha=8,routing=duplicate",
    "masked_slots": "E=4,k=2,H=64,I=128,T=11,r=4,alpha=8,routing=masked",
    "all_masked": "E=4,k=2,H=64,I=128,T=11,r=4,alpha=8,routing=all_masked",
    "every_expert_of_every_token": "E=5,k=5,H=64,I=32,T=18,r=2,alpha=3",
}


def check_edge(target: Target, case: Case) -> None:
    """Shapes and dtypes as docs/contract.md, "The layer", has them, values within the budgets."""
    inputs = make_inputs(case)
    found = target.run(case, inputs)
    judged(target, case.id, case, found, inputs)


enter(
    Check(
        f"edge/{name}",
        "contract",
        check_edge,
        "No size is too small or too odd: T = 0, T = 1, all tokens on one expert, H = 97, I = 47, r = 3 are ordinary "
        "input.",
        (*NUMBERS, "form"),
        case=Case.parse(text),
        confirmable=True,
    )
    for name, text in EDGES.items()
)


@check(
    "behaviour",
    "A slot whose id is −1 belongs to another layer: it adds nothing, whatever its weight, and its routing gradient "
    "is 0.",
    gates=("bits", "stray"),
    cause=Cause.IDS,
)
def check_masked_weights_do_not_count(target: Target) -> None:
    """A slot of id -1 contributes nothing, whatever its routing weight is."""
    case = dataclasses.replace(SMALL, routing="masked")
    inputs = make_inputs(case)
    expected = target.run(case, inputs)
    masked = inputs.expert_ids < 0
    expect(bool(masked.any()), "the case masks nothing")
    for value in (0.0, 1e30, float("inf"), float("nan")):
        weights = torch.where(masked, torch.tensor(value), inputs.weights)
        found = target.run(case, changed(inputs, weights=weights))
        cause = Cause.IDS if math.isfinite(value) else Cause.NON_FINITE
        target.expect_same_bits(f"weight {value} in masked slots", expected, found, cause=cause)
        target.expect(not bool(found[GRAD_WEIGHTS][masked].any()), "grad_weights of masked slots must be zero", "stray")


@check("behaviour", SAME_BITS, cause=Cause.MEMORY_LAYOUT, variants={"": {}, "_at_odd_sizes": {"case": ODD_MIDDLE}})
def check_odd_addresses(target: Target, case: Case = MIDDLE) -> None:
    """Tensors one byte and one element off any alignment give the bits of aligned ones."""
    inputs = make_inputs(case)
    expected = target.run(case, inputs)
    for step in (1, 2, 4, 63):
        moved = everywhere(inputs, lambda tensor: at_offset(tensor, step))  # noqa: B023 - called at once
        expect(moved.hidden_states.data_ptr() % 64 == step, "the test did not get its address")
        target.expect_same_bits(f"{case.id} at addresses 64 n + {step}", expected, target.run(case, moved))


@check(
    "behaviour",
    "Tensors that are not contiguous, lie at odd addresses or require a gradient are no bad input.",
    cause=Cause.MEMORY_LAYOUT,
)
def check_strides(target: Target) -> None:
    """Non-contiguous tensors are accepted and give the bits of contiguous ones; so do tensors that require grad."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else spaced(tensor)

    def spaced(tensor: Tensor) -> Tensor:
        wide = torch.zeros(*tensor.shape[:-1], 3 * tensor.shape[-1], dtype=tensor.dtype)
        wide[..., 1::3] = tensor
        return wide[..., 1::3]

    for change in (transposed, spaced):
        moved = everywhere(inputs, change)
        expect(not moved.hidden_states.is_contiguous(), "the test made a contiguous tensor")
        # running.build_layer clones the LoRA tensors, which would make them contiguous
        layer = target.bare(MIDDLE)
        layer.load_weights_from_tensors(moved.gate_proj, moved.up_proj, moved.down_proj, moved.physical_map)
        layer.init_lora_weights(*moved.lora.values())
        target.expect_same_bits(change.__name__, expected, run_layer(layer, moved))

    def tracked(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor

    found = target.run(MIDDLE, everywhere(inputs, tracked))
    target.expect_same_bits(
        "tensors that require grad", expected, {name: tensor.detach() for name, tensor in found.items()}
    )


@check("behaviour", ALONE, gates=NUMBERS)
def check_outlier_token(target: Target) -> None:
    """One token 48 times as large as the others, as first tokens are in real models: the others are still computed.

    It alone makes up the norm, so rel_l2 is blind to all the rest; the mean is not.
    """
    case = Case.parse("E=2,k=2,H=96,I=96,T=300,r=8,alpha=16")
    inputs = make_inputs(case)
    inputs.hidden_states[0] *= 48
    judged(target, "a token 48 times as large as the others", case, target.run(case, inputs), inputs)


@check(
    "behaviour",
    "A NaN or Inf in a token's row shows in that token's result, reaches beside it only the gradients of its experts, "
    "and is gone by the next call.",
    gates=("bits", "hidden_non_finite"),
    cause=Cause.NON_FINITE,
)
def check_non_finite_isolation(target: Target) -> None:
    """A NaN or Inf in one token's row reaches that token and the gradients of its experts, and nothing else."""
    # nine experts for two tokens' worth of slots: some experts never meet the broken token
    case = dataclasses.replace(MIDDLE, num_experts=9, qlen=21)
    inputs = make_inputs(case)
    clean = target.run(case, inputs)
    token = 7
    hit = reached(inputs.expert_ids[token])
    spared = [expert for expert in reached(inputs.expert_ids) if expert not in hit]
    expect(bool(spared), "the case has no expert that the token spares")
    others = [row for row in range(case.qlen) if row != token]
    for value in (float("nan"), float("inf"), float("-inf")):
        for name in ("hidden_states", "grad_output"):
            broken = getattr(inputs, name).clone()
            broken[token, 13] = value
            layer = target.layer(case, inputs)
            found = run_layer(layer, changed(inputs, **{name: broken}))
            what = f"{value} in {name}[{token}, 13]"
            for tensor in (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS):
                target.expect(
                    same_bits(clean[tensor][others], found[tensor][others]),
                    f"{what} reached other rows of {tensor}",
                    "bits",
                )
            for tensor in GRAD_NAMES:
                same = same_bits(clean[tensor][spared], found[tensor][spared])
                target.expect(same, f"{what} reached {tensor} of experts that the token was not routed to", "bits")
            shown = found[OUTPUT] if name == "hidden_states" else found[GRAD_INPUT]
            target.expect(not bool(torch.isfinite(shown[token]).all()), f"{what} was hidden", "hidden_non_finite")
            # nothing of it may be left in a buffer
            after = run_layer(layer, inputs)
            target.expect_same_bits(f"the call after {what}", clean, after, cause=Cause.STALE_VALUES)


def reached(ids: Tensor) -> list[int]:
    """The experts that expert_ids name, ascending."""
    return sorted({int(expert) for expert in ids.reshape(-1) if expert >= 0})


@check(
    "behaviour",
    "An expert without a token has gradients of exactly 0, also after a call that reached it.",
    gates=("stray", "bits"),
    cause=Cause.STALE_VALUES,
)
def check_idle_experts(target: Target) -> None:
    """Experts without a token have gradients of exactly zero, also after a call that reached them, and whatever the
    caller wrote into the gradients of that call before it dropped them."""
    inputs = make_inputs(MIDDLE)
    layer = target.layer(MIDDLE, inputs)
    for idle in ([5], [0], [1, 2, 3], [4], list(range(1, 6))):
        for gradient in run_layer(layer, inputs).values():
            gradient.fill_(math.nan)
            written(layer)
        busy = [expert for expert in range(MIDDLE.num_experts) if expert not in idle]
        ids = torch.tensor(busy)[inputs.expert_ids % len(busy)]
        found = run_layer(layer, changed(inputs, expert_ids=ids))
        for name in GRAD_NAMES:
            left = int(torch.count_nonzero(found[name][idle]))
            target.expect(left == 0, f"{name} of the idle experts {idle} has {left} elements other than 0", "stray")
            target.expect(bool(found[name][busy].any()), f"{name} of the busy experts {busy} is all zero", "bits")


@check(
    "behaviour",
    "slot p contains logical expert physical_map[p]. Ids, LoRA and gradients are logical.",
    cause=Cause.EXPERT_PERMUTATION,
)
def check_physical_map(target: Target) -> None:
    """Slots in another order, with their physical_map, change no bit; the map is not ignored."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)
    order = torch.tensor([3, 5, 0, 1, 4, 2])

    def load(physical_map: Tensor) -> dict[str, Tensor]:
        layer = target.bare(MIDDLE)
        layer.load_weights_from_tensors(*(getattr(inputs, name)[order] for name in BASE_NAMES), physical_map)
        layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
        return run_layer(layer, inputs)

    target.expect_same_bits("physical_map [3, 5, 0, 1, 4, 2]", expected, load(order))
    target.expect(not same_bits(load(torch.arange(6))[OUTPUT], expected[OUTPUT]), "physical_map is ignored", "bits")
