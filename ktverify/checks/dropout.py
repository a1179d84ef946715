"""lora_dropout: the masks of a training forward are read from its LoRA gradients, element by element.

Comparisons of shares use Hoeffding's bound: the mean of n independent draws is further than t from its expectation with
a probability of at most 2 exp(-2 n t^2).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import changed, with_case
from ktverify.checks.causes import Cause
from ktverify.checks.check import check
from ktverify.checks.judging import NUMBERS, expect_forms, raise_for
from ktverify.checks.target import MIDDLE, Target, expect, same_bits
from ktverify.engines.run import backward_of, forward, run_layer
from ktverify.judge import gates, metrics, reference
from ktverify.judge.rounding import rounding_errors
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS, OUTPUT

Tensors = dict[str, Tensor]
Kept = dict[str, Tensor]  # which elements were kept: "gate", "up" [T, k, H], "down" [T, k, I], bool

PROJECTIONS = ("gate", "up", "down")
P = 0.25
# many rows of each expert; the rank is T, so that a row of a gradient can belong to one token
READ = Case.parse("E=6,k=4,H=128,I=96,T=32,r=32,alpha=64")
# 24 tokens with two slots, and an expert for each slot; drawn with k = E, so that every expert has base weights
APART = Case.parse("E=48,k=48,H=96,I=64,T=24,r=8,alpha=32,lora=float32")
# h is one number everywhere, so that a sum over I counts the kept elements
COUNT = Case.parse("E=1,k=1,H=32,I=512,T=64,r=1,alpha=1,lora=float32")


# ---- inputs, and what their gradients show


def _one_row_a_token() -> Inputs:
    """Inputs of READ: row t of the gradients of LoRA A is a multiple of what LoRA got of token t.

    grad_output, down_proj and the B matrices are ones on the diagonal, so dy, dh, dg and du of token t have one element
    each, the one in column t. The A matrices are 0, so that these elements do not depend on the masks.
    """
    inputs, case = make_inputs(READ), READ

    def eye(rows: int, columns: int) -> Tensor:
        return torch.eye(rows, columns, dtype=torch.bfloat16)

    def of_experts(matrix: Tensor) -> Tensor:
        return matrix.expand(case.num_experts, -1, -1).contiguous()

    return changed(
        inputs,
        grad_output=eye(case.qlen, case.hidden),
        down_proj=of_experts(eye(case.hidden, case.intermediate)),
        gate_lora_b=of_experts(eye(case.intermediate, case.rank)),
        up_lora_b=of_experts(eye(case.intermediate, case.rank)),
        down_lora_b=of_experts(eye(case.hidden, case.rank)),
        **{f"{name}_lora_a": torch.zeros_like(inputs.lora[f"{name}_lora_a"]) for name in PROJECTIONS},
    )


def _one_expert_a_slot() -> Inputs:
    """Inputs of APART with two slots: every expert has one row, so a gradient of its LoRA A shows what LoRA got."""
    inputs = make_inputs(APART)
    ids = torch.arange(APART.num_experts).view(APART.qlen, 2)
    few = changed(inputs, expert_ids=ids, weights=inputs.weights[:, :2] * (APART.num_experts / 2))
    return with_case(few, top_k=2)


def _kept(found: Tensors, inputs: Inputs) -> Kept:
    """Which elements LoRA got in the forward of these gradients; inputs: of _one_row_a_token or _one_expert_a_slot."""
    ids = inputs.expert_ids
    kept = {}
    for name in PROJECTIONS:
        gradient = found[f"grad_{name}_lora_a"] != 0
        if inputs.case.num_experts == ids.numel():
            kept[name] = gradient.any(1)[ids]
        else:
            kept[name] = gradient[ids, torch.arange(len(ids)).unsqueeze(1)]
    return kept


def _layer(target: Target, inputs: Inputs, p: float = P, **more: object) -> object:
    return target.layer(inputs.case, inputs, lora_dropout=p, **more)


# ---- statistics


def _share(target: Target, what: str, hits: Tensor, expected: float) -> None:
    """GateFailed unless the share of true elements, independent draws, is near `expected`."""
    alarm = float(gates.tolerances()["masks"]["false_alarm"])
    budget = math.sqrt(math.log(2 / alarm) / (2 * hits.numel()))
    found = float(hits.double().mean())
    text = f"{what}: {found:.3f}, expected {expected:.3f} within {budget:.3f}"
    target.expect(abs(found - expected) <= budget, text, "masks", abs(found - expected) / budget)


def _all_differ(target: Target, what: str, rows: Tensor) -> None:
    """GateFailed where two of the masks [n, columns] are equal."""
    twice = len(rows) - len(torch.unique(rows, dim=0))
    target.expect(twice == 0, f"{what}: {twice} of {len(rows)} masks occur again", "masks")


def _rows(kept: Kept) -> Tensor:
    """The masks of all slots and projections one under the other, as wide as the narrowest."""
    width = min(mask.shape[-1] for mask in kept.values())
    return torch.cat([mask[..., :width].reshape(-1, width) for mask in kept.values()])


@check(
    "dropout",
    "Each element of a LoRA's input is set to 0 with probability p, for each token slot, independently of every other; "
    "gate and up have masks of their own.",
    gates=("masks",),
    cause=Cause.DROPOUT,
    variants={"": {"p": P}, "_of_most": {"p": 0.6}, "_of_two_parts": {"p": P, "tp": 2}},
)
def check_elements(target: Target, p: float, tp: int = 1) -> None:
    """Shares of dropped elements, agreements of neighbours, and masks that occur twice; also where I has two
    tensor-parallel parts."""
    inputs = _one_row_a_token()
    torch.manual_seed(11)
    kept = _kept(run_layer(_layer(target, inputs, p, tp=tp), inputs), inputs)
    alike = p * p + (1 - p) * (1 - p)
    for name, mask in kept.items():
        _share(target, f"share of elements of {name}'s input that are 0", ~mask, p)
        _share(target, f"{name}: neighbouring tokens alike", mask[0::2] == mask[1::2], alike)
        _share(target, f"{name}: slots of a token alike", mask[:, 0::2] == mask[:, 1::2], alike)
        _share(target, f"{name}: neighbouring columns alike", mask[..., 0::2] == mask[..., 1::2], alike)
        _all_differ(target, f"columns of {name}", mask.flatten(0, 1).T)
    _share(target, "gate and up alike", kept["gate"] == kept["up"], alike)
    _share(target, "gate and down alike", kept["gate"][..., : READ.intermediate] == kept["down"], alike)
    _all_differ(target, "rows of gate, up and down", _rows(kept))


@check("dropout", "The next forward draws other masks.", gates=("masks",), cause=Cause.DROPOUT)
def check_next_forward(target: Target) -> None:
    """The same call again has other masks, also while the first one waits for its backward, and on another layer."""
    inputs = _one_row_a_token()
    torch.manual_seed(12)
    layer = _layer(target, inputs)
    calls = [_kept(run_layer(layer, inputs), inputs) for _ in range(2)]
    calls.append(_kept(run_layer(_layer(target, inputs), inputs), inputs))
    alike = P * P + (1 - P) * (1 - P)
    for name in PROJECTIONS:
        for other in calls[1:]:
            _share(target, f"{name}: masks of two forwards alike", calls[0][name] == other[name], alike)
    _all_differ(target, "rows of three forwards", torch.cat([_rows(kept) for kept in calls]))


# ---- exact consequences


@check(
    "dropout",
    "The backward of that forward uses its masks, and no other tensor is dropped.",
    gates=(*NUMBERS, "form"),
    cause=Cause.DROPOUT,
)
def check_same_masks_in_backward(target: Target) -> None:
    """With the masks that the gradients of LoRA A show, the oracle gives the output and all gradients; also of two
    forwards that wait together."""
    inputs = _one_expert_a_slot()
    torch.manual_seed(13)
    layer = _layer(target, inputs, max_cache_depth=2)
    outputs = [forward(layer, inputs, save=True) for _ in range(2)]
    for number in (1, 0):
        found = {OUTPUT: outputs[number], **backward_of(layer, inputs)}
        _judge_dropped(target, f"forward {number + 1} of two", found, inputs)


def _judge_dropped(target: Target, what: str, found: Tensors, inputs: Inputs) -> None:
    expect_forms(target, what, found, inputs)
    kept = _kept(found, inputs)
    masks = {name: mask / (1 - P) for name, mask in kept.items()}
    oracle, without = (reference.forward_backward(inputs, masks=each) for each in (masks, None))
    rounding = rounding_errors(inputs, masks=masks)
    judgements = []
    for name in ALL_TENSORS:
        difference = metrics.compare(found[name], oracle[name])
        judgements.append(gates.judge(inputs.case, name, difference, rounding[name], gates_off=target.gates_off))
        if not any(bool(mask.all()) for mask in kept.values()):
            apart = metrics.compare(without[name], oracle[name]).rel_l2
            expect(
                apart > gates.tolerances()["check"]["least_difference"],
                f"the case cannot show dropout in {name}: {apart:.1e}",
            )
    raise_for(f"{what}, beside the oracle with the masks that its gradients show", judgements)


@check(
    "dropout",
    "Kept elements are divided by 1 − p, so that the expected value of a LoRA's input is the input.",
    gates=("masks",),
    cause=Cause.DROPOUT,
)
def check_expected_value(target: Target) -> None:
    """The mean of a LoRA term over 4 x 64 x 512 elements is the term without dropout."""
    inputs, case = make_inputs(COUNT), COUNT
    first = torch.zeros(case.num_experts, case.intermediate, case.hidden, dtype=torch.bfloat16)
    first[..., 0] = 1
    lora = {name: torch.zeros_like(tensor) for name, tensor in inputs.lora.items()}
    lora["down_lora_a"], lora["down_lora_b"] = (torch.ones_like(lora[f"down_lora_{each}"]) for each in "ab")
    tokens = {"hidden_states": torch.ones_like(inputs.hidden_states), "weights": torch.ones_like(inputs.weights)}
    base = {"gate_proj": first, "up_proj": first, "down_proj": torch.zeros_like(inputs.down_proj)}
    inputs = changed(inputs, **tokens, **base, **lora)
    torch.manual_seed(14)
    layer = _layer(target, inputs)
    whole = float(forward(layer, inputs, save=False).double().mean())
    calls = 4
    mean = sum(float(run_layer(layer, inputs)[OUTPUT].double().mean()) for _ in range(calls)) / calls
    numbers = gates.tolerances()["masks"]
    bound = math.sqrt(math.log(2 / numbers["false_alarm"]) / (2 * calls * case.qlen * case.intermediate))
    budget = bound / (1 - P) + float(numbers["rounding"])
    apart = abs(mean / whole - 1)
    text = f"the mean of {calls} forwards is {mean:.4g}, without dropout it is {whole:.4g}: {apart:.1%} apart"
    target.expect(apart <= budget, text.replace("%", " %"), "masks", apart / budget)


@check(
    "dropout",
    "After the same torch.manual_seed, the same calls have the same bits with any number of threads; after another "
    "seed, other masks.",
    cause=Cause.DROPOUT,
)
def check_seed(target: Target) -> None:
    """Two forwards and their backwards after a seed: again, with other numbers of threads, and after another seed."""
    inputs = make_inputs(dataclasses.replace(MIDDLE, lora_dtype="float32"))

    def calls(seed: int, threads: int | None = target.threads) -> list[Tensors]:
        layer = _layer(target, inputs, threads=threads)
        torch.manual_seed(seed)
        return [run_layer(layer, inputs) for _ in range(2)]

    first = calls(15)
    for threads in (target.threads, 1, 3, 16):
        for number, (a, b) in enumerate(zip(first, calls(15, threads), strict=True), start=1):
            target.expect_same_bits(f"call {number} after the same seed, {threads} threads", a, b)
    other = calls(16)
    target.expect(not same_bits(first[0][OUTPUT], other[0][OUTPUT]), "another seed has the same masks", "bits")


@check(
    "dropout",
    "A forward without save_for_backward has the bits of a layer without dropout",
    cause=Cause.DROPOUT,
)
def check_evaluation(target: Target) -> None:
    """An unsaved forward of a layer with dropout has the bits of one without, before and after saved forwards."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)
    layer = _layer(target, inputs)
    for when in ("before a saved forward", "after it", "after its backward"):
        found = {OUTPUT: forward(layer, inputs, save=False)}
        target.expect_same_bits(f"an unsaved forward {when}", expected, found, (OUTPUT,))
        if when == "before a saved forward":
            forward(layer, inputs, save=True)
        elif when == "after it":
            backward_of(layer, inputs)


@check(
    "native", "It has no dropout: lora_dropout above 0 is NotImplementedError.", gates=(), native=True, internal=True
)
def check_dropout_is_declared(target: Target) -> None:
    """NotImplementedError in one line that names lora_dropout, not a layer that drops nothing."""
    try:
        target.bare(lora_dropout=P)
    except NotImplementedError as error:
        text = str(error)
        expect("lora_dropout" in text and len(text.splitlines()) == 1, f"the error says {text!r}")
    else:
        expect(False, f"lora_dropout={P} was accepted")


@check("dropout", "with p = 0, the default, every forward has.", cause=Cause.DROPOUT)
def check_zero(target: Target) -> None:
    """lora_dropout=0 changes no bit, and takes no number from torch's generator."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)
    before = torch.get_rng_state()
    target.expect_same_bits("lora_dropout=0.0", expected, run_layer(_layer(target, inputs, 0.0), inputs))
    target.expect(bool(torch.equal(before, torch.get_rng_state())), "lora_dropout=0.0 takes random numbers", "bits")
