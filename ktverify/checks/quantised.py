"""Quantised base weights: exactly the weights that codes stand for, in both directions; refusals; memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import changed
from ktverify.checks.causes import Cause
from ktverify.checks.check import Function, Where, check
from ktverify.checks.quantised_inputs import PlainCodes, as_bf16, bare_of, draw, layer_of, readings, shapes_of
from ktverify.checks.target import Target
from ktverify.engines.run import run_layer
from ktverify.isolation import hosted
from ktverify.judge.dequantise import CODINGS, Coding, codes_of
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

RULE = "The weights are W = bf16(q · s), with q and s in fp32; with zero points W = bf16((q − z) · s)."
SAME = "A layer of codes has the bits of the bf16 layer that is loaded with W, at every tensor-parallel degree."
MADE = (
    "AMXINT8_SFT, AMXINT4_SFT and AMXFP8_SFT also take bf16 weights without scales, and make the codes (q, s) of each "
    "expert's matrix w [N, K] by these lines, those of int4 in groups of 32:"
)
MADE_ONE_BY_ONE = (
    "It makes codes of bf16 weights a few rows at a time: beside the given weights and the codes, loading takes less "
    "than one expert's bf16."
)
COMPACT = (
    "Codes stay codes in memory: with all experts packed they take at most 1.05 times the bytes of codes, scales and "
    "zero points."
)

# multiples of nothing, or of a group; blocks of 128 are crossed in both directions
READ = {8: "E=1,k=1,H=131,I=66,T=1,r=1,alpha=1", 4: "E=1,k=1,H=160,I=64,T=1,r=1,alpha=1"}
READ_128 = "E=1,k=1,H=256,I=128,T=1,r=1,alpha=1"
DRAWN = {8: "E=5,k=3,H=161,I=141,T=19,r=3,alpha=5,map=permuted", 4: "E=5,k=3,H=160,I=96,T=19,r=3,alpha=5,map=permuted"}
DRAWN_128 = "E=3,k=2,H=256,I=128,T=9,r=3,alpha=5"
# parts of 118 and 59 columns, and of one or two groups
PARTS = {8: "E=3,k=2,H=64,I=236,T=9,r=3,alpha=5", 4: "E=3,k=2,H=64,I=128,T=9,r=3,alpha=5"}
PARTS_128 = "E=2,k=1,H=128,I=512,T=5,r=3,alpha=5"
VARIANTS: dict[str, dict[str, Any]] = {f"/{label}": {"label": label} for label in CODINGS}
# of whole blocks of 128, for engines that take no others
VARIANTS |= {f"/{label}_whole": {"label": label, "whole": True} for label in ("fp8", "int8")}
# those that an engine makes of bf16 weights
MADE_OF_BF16 = ("int8", "int4_32", "fp8")


def _case(coding: Coding, sizes: dict[int, str], of_128: str, whole: bool = False) -> Case:
    return Case.parse(of_128 if whole or (coding.bits == 4 and coding.group == 128) else sizes[coding.bits])


def _quantised(contract: str, kind: str = "quantised", **more: Any) -> Callable[[Function], Function]:
    return check(kind, contract, family="quantised", cause=Cause.QUANTISATION, **more)


def _of_memory(contract: str) -> Callable[[Function], Function]:
    """A check of the native engine alone that measures a process of its own."""
    settings: dict[str, Any] = {"gates": ("resources",), "where": Where.OWN_CHOICE, "fresh_process": True}
    return _quantised(contract, "quantised_memory", native=True, internal=True, **settings)


@_quantised(RULE, variants=VARIANTS)
def check_weights(target: Target, label: str, whole: bool = False) -> None:
    """One-hot rows read the matrices back, with all codes: up_proj and down_proj in both directions, gate_proj in the
    backward; without the last column of gate_proj and up_proj. Values are compared, the sign of a zero is not."""
    coding = CODINGS[label]
    for what, one in readings(coding, _case(coding, READ, READ_128, whole)).items():
        case = one.inputs.case
        found = one.read(run_layer(layer_of(target, one.coded, case, one.inputs), one.inputs)[one.result].float())
        wrong = (found != one.expected.float()).nonzero()
        if len(wrong):
            first = tuple(wrong[0].tolist())
            text = f"{len(wrong)} of {found.numel()} weights, first [{first[0]}, {first[1]}]"
            text += f": expected {float(one.expected[first])}, found {float(found[first])}"
            target.expect(False, f"{label}, {what}: {text}", "bits")


@_quantised(SAME, variants=VARIANTS)
def check_same_bits(target: Target, label: str, whole: bool = False) -> None:
    """All results of a layer of codes have the bits of the same engine's layer of bf16 weights; so have SkipLoRA's."""
    coding = CODINGS[label]
    case = _case(coding, DRAWN, DRAWN_128, whole)
    coded, inputs = draw(coding, case), make_inputs(case)
    expected = target.run(case, as_bf16(coded, inputs))
    layer = layer_of(target, coded, case, inputs)
    for again in ("", ", again"):
        target.expect_same_bits(f"{label} and bf16{again}", expected, run_layer(layer, inputs))
    skipping = replace(target, method=f"{target.method}_SkipLoRA")
    expected = skipping.run(case, as_bf16(coded, inputs))
    found = run_layer(layer_of(skipping, coded, case, inputs), inputs)
    target.expect_same_bits(f"{label} and bf16, SkipLoRA", expected, found)


@_quantised(SAME, variants=VARIANTS)
def check_parts(target: Target, label: str, whole: bool = False) -> None:
    """The same with tensor-parallel degrees 2 and 4. Of 8 bits, parts begin inside blocks of 128 and of 32."""
    coding = CODINGS[label]
    case = _case(coding, PARTS, PARTS_128, whole)
    coded, inputs = draw(coding, case), make_inputs(case)
    for tp in (2, 4):
        expected = target.run(case, as_bf16(coded, inputs), tp=tp)
        found = run_layer(layer_of(target, coded, case, inputs, tp=tp), inputs)
        target.expect_same_bits(f"{label} and bf16, TP {tp}", expected, found)


@_quantised(MADE, variants={f"/{label}": {"label": label} for label in MADE_OF_BF16})
def check_made_of_bf16(target: Target, label: str) -> None:
    """bf16 weights without scales give the bits of the codes that the contract's lines make, and of their W. Among them
    are zeros, the smallest and the largest numbers, and numbers in the middle between two codes."""
    coding = CODINGS[label]
    inputs = make_inputs(_case(coding, DRAWN, ""))
    inputs = changed(inputs, **{name: _with_rare(getattr(inputs, name)) for name in BASE_NAMES})
    layer = bare_of(target, coding, inputs.case)
    layer.load_weights_from_tensors(*(inputs.slotted(name) for name in BASE_NAMES), inputs.physical_map)
    layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
    made = {name: codes_of(coding, getattr(inputs, name)) for name in BASE_NAMES}
    coded = PlainCodes(coding, {name: made[name][0] for name in made}, {name: made[name][1] for name in made}, None)
    found = run_layer(layer, inputs)
    given = run_layer(layer_of(target, coded, inputs.case, inputs), inputs)
    target.expect_same_bits(f"{label} of bf16 and given codes", given, found)
    target.expect_same_bits(f"{label} of bf16 and bf16", target.run(inputs.case, as_bf16(coded, inputs)), found)


def _with_rare(weight: Tensor) -> Tensor:
    """A copy of [E, N, K] in which the first three experts each have a row, a group or a block of its own kind."""
    found = weight.clone()
    found[0, 1] = 0
    found[0, :, 32:64] = 0
    found[1, 2] = torch.arange(weight.shape[2]).to(torch.bfloat16) * 2.0**-133  # subnormal, its scale is 0 for int4
    # with one of the numbers after it, the scale is 1 for int8, int4 and fp8: halves lie between two codes
    found[2, 3] = (torch.arange(weight.shape[2]) % 8 - 3.5).to(torch.bfloat16)
    found[2, 3, ::32] = 7
    found[2, 4] = (torch.arange(weight.shape[2]) % 128 - 63.5).to(torch.bfloat16)
    found[2, 4, 0] = 127
    found[2, 128:, :] = (torch.arange(weight.shape[2]) % 448 + 0.5).to(torch.bfloat16)
    found[2, -1, ::128] = 448
    return found


@_of_memory(COMPACT)
def check_compact(target: Target) -> None:
    """A layer whose caller has dropped its codes holds them alone, in every format, once all experts are packed."""
    case = Case.parse("E=4,k=1,H=2048,I=1024,T=4,r=1,alpha=1")
    inputs = make_inputs(case)
    tokens = changed(inputs, expert_ids=torch.arange(4)[:, None], weights=torch.ones(4, 1))
    # the first round of each format is not measured: it loads libraries and starts workers
    for measured, (label, coding) in itertools.product((False, True), CODINGS.items()):
        layer = bare_of(target, coding, case)
        layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
        layer.clear_sft_buffer_cache()
        before = hosted.resident()
        given = _constant(coding, case)
        size = sum(one.nbytes for one in _tensors(given))
        layer.load_weights_from_tensors(**given)
        del given
        layer.forward_sft(tokens.hidden_states, tokens.expert_ids, tokens.weights, save_for_backward=False)
        layer.clear_sft_buffer_cache()
        held = hosted.resident() - before
        text = f"{label}: {held / 1e6:.1f} MB are held for {size / 1e6:.1f} MB of codes, scales and zero points"
        target.expect(not measured or held <= 1.05 * size, text, "resources", held / (1.05 * size))
        del layer


@_of_memory(MADE_ONE_BY_ONE)
def check_made_one_by_one(target: Target) -> None:
    """The most memory that loading bf16 weights takes, in each format that is made of them."""
    for label in MADE_OF_BF16:
        # the small layer is not measured: it loads libraries and starts threads
        _loading(target, CODINGS[label], Case.parse("E=1,k=1,H=512,I=512,T=1,r=1,alpha=1"))
        beside, one = _loading(target, CODINGS[label], Case.parse("E=4,k=1,H=2048,I=2048,T=1,r=1,alpha=1"))
        text = (
            f"{label}: loading takes {beside / 1e6:.1f} MB beside the codes, an expert has {one / 1e6:.1f} MB of bf16"
        )
        target.expect(beside < one, text, "resources", beside / one)


def _loading(target: Target, coding: Coding, case: Case) -> tuple[int, int]:
    """The most bytes beside given weights and codes while a layer takes bf16 weights, and those of an expert's bf16."""
    shapes = shapes_of(case)
    given = {name: torch.ones(case.num_experts, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    one = sum(tensor.nbytes for tensor in given.values()) // case.num_experts
    scales = sum(torch.Size(coding.scale_shape(case.num_experts, *shape)).numel() for shape in shapes.values())
    codes = case.num_experts * one * coding.bits // 16 + 4 * scales
    layer = bare_of(target, coding, case)
    before = hosted.resident()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    layer.load_weights_from_tensors(**given, physical_map=torch.arange(case.num_experts))
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return peak - before - codes, one


def _constant(coding: Coding, case: Case) -> dict[str, Any]:
    """The arguments of load_weights_from_tensors, each tensor of one value: quickly made."""
    small = draw(coding, Case.parse("E=1,k=1,H=256,I=256,T=1,r=1,alpha=1")).arguments()
    found: dict[str, Any] = {"physical_map": torch.arange(case.num_experts)}
    scales, zeros = [], []
    for position, (name, (rows, columns)) in enumerate(shapes_of(case).items()):
        code = small[name].view(torch.uint8).flatten()[0]
        size = (case.num_experts, rows, columns * coding.bits // 8)
        found[name] = torch.full(size, int(code), dtype=torch.uint8).view(small[name].dtype)
        shape = coding.scale_shape(case.num_experts, rows, columns)
        scales.append(torch.ones(shape, dtype=small["scales"][position].dtype))
        zeros.append(torch.zeros(shape, dtype=torch.int8))
    return found | {"scales": tuple(scales)} | ({"zero_points": tuple(zeros)} if coding.zeros else {})


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    return [given[name] for name in BASE_NAMES] + [*given["scales"], *given.get("zero_points", ())]
