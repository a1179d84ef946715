"""Quantised base weights: exactly the weights that codes stand for, in both directions; refusals; memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import changed
from ktverify.checks.causes import Cause
from ktverify.checks.check import Function, Where, check
from ktverify.checks.quantised_inputs import as_bf16, bare_of, draw, layer_of, readings, shapes_of
from ktverify.checks.target import Target
from ktverify.engines.run import run_layer
from ktverify.isolation import hosted
from ktverify.judge.dequantise import KINDS, Kind
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

RULE = "The weights are W = bf16(q · s), with q and s in fp32; with zero points W = bf16((q − z) · s)."
SAME = "A layer of codes has the bits of the bf16 layer that is loaded with W, at every tensor-parallel degree."
MADE = (
    "AMXINT8_SFT and AMXINT4_SFT also take bf16 weights without scales, and make the codes themselves, by these lines:"
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
VARIANTS = {f"/{label}": {"label": label} for label in KINDS}


def _case(kind: Kind, sizes: dict[int, str], of_128: str) -> Case:
    return Case.parse(of_128 if kind.label == "int4_128" else sizes[kind.bits])


def _quantised(contract: str, kind: str = "quantised", **more: Any) -> Callable[[Function], Function]:
    return check(kind, contract, family="quantised", cause=Cause.QUANTISATION, **more)


@_quantised(RULE, variants=VARIANTS)
def check_weights(target: Target, label: str) -> None:
    """One-hot rows read the matrices back, with all codes: up_proj and down_proj in both directions, gate_proj in the
    backward; without the last column of gate_proj and up_proj. Values are compared, the sign of a zero is not."""
    kind = KINDS[label]
    for what, one in readings(kind, _case(kind, READ, READ_128)).items():
        case = one.inputs.case
        found = one.read(run_layer(layer_of(target, one.coded, case, one.inputs), one.inputs)[one.result].float())
        wrong = (found != one.expected.float()).nonzero()
        if len(wrong):
            first = tuple(wrong[0].tolist())
            text = f"{len(wrong)} of {found.numel()} weights, first [{first[0]}, {first[1]}]"
            text += f": expected {float(one.expected[first])}, found {float(found[first])}"
            target.expect(False, f"{label}, {what}: {text}", "bits")


@_quantised(SAME, variants=VARIANTS)
def check_same_bits(target: Target, label: str) -> None:
    """All results of a layer of codes have the bits of the same engine's layer of bf16 weights; so have SkipLoRA's."""
    kind = KINDS[label]
    case = _case(kind, DRAWN, DRAWN_128)
    coded, inputs = draw(kind, case), make_inputs(case)
    expected = target.run(case, as_bf16(coded, inputs))
    layer = layer_of(target, coded, case, inputs)
    for again in ("", ", again"):
        target.expect_same_bits(f"{label} and bf16{again}", expected, run_layer(layer, inputs))
    skipping = replace(target, method=f"{target.method}_SkipLoRA")
    expected = skipping.run(case, as_bf16(coded, inputs))
    found = run_layer(layer_of(skipping, coded, case, inputs), inputs)
    target.expect_same_bits(f"{label} and bf16, SkipLoRA", expected, found)


@_quantised(SAME, variants=VARIANTS)
def check_parts(target: Target, label: str) -> None:
    """The same with tensor-parallel degrees 2 and 4. Of 8 bits, parts begin inside blocks of 128 and of 32."""
    kind = KINDS[label]
    case = _case(kind, PARTS, PARTS_128)
    coded, inputs = draw(kind, case), make_inputs(case)
    for tp in (2, 4):
        expected = target.run(case, as_bf16(coded, inputs), tp=tp)
        found = run_layer(layer_of(target, coded, case, inputs, tp=tp), inputs)
        target.expect_same_bits(f"{label} and bf16, TP {tp}", expected, found)


def _int8(weight: Tensor) -> Tensor:
    """W of bf16 [E, N, K]: a scale for each row, as the contract has it."""
    s = weight.float().abs().amax(-1, keepdim=True) / 127
    s = torch.where(s > 0, s, 1.0)
    return ((weight.float() / s).round().clamp(-127, 127) * s).to(torch.bfloat16)


def _int4(weight: Tensor) -> Tensor:
    """W of bf16 [E, N, K]: a scale for 32 weights of a row, as the contract has it."""
    w = weight.float().view(*weight.shape[:2], -1, 32)
    s = (w.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16).float()
    s = torch.where(s > 0, s, 1.0)
    return ((w / s).round().clamp(-8, 7) * s).to(torch.bfloat16).view(weight.shape)


@_quantised(MADE, variants={f"/{label}": {"label": label} for label in ("int8", "int4_32")})
def check_made_of_bf16(target: Target, label: str) -> None:
    """bf16 weights without scales, a row of zeros among them, give the bits of the W that the contract's lines make."""
    kind = KINDS[label]
    inputs = make_inputs(_case(kind, DRAWN, ""))
    inputs.gate_proj[0, 1] = 0
    layer = bare_of(target, kind, inputs.case)
    layer.load_weights_from_tensors(*(inputs.slotted(name) for name in BASE_NAMES), inputs.physical_map)
    layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
    made = _int8 if label == "int8" else _int4
    weights = {name: made(getattr(inputs, name)) for name in BASE_NAMES}
    expected = target.run(inputs.case, changed(inputs, **weights))
    target.expect_same_bits(f"{label} of bf16", expected, run_layer(layer, inputs))


@_quantised(
    COMPACT,
    "quantised_memory",
    gates=("resources",),
    where=Where.OWN_CHOICE,
    fresh_process=True,
    native=True,
    internal=True,
)
def check_compact(target: Target) -> None:
    """A layer whose caller has dropped its codes holds them alone, in every format, once all experts are packed."""
    case = Case.parse("E=4,k=1,H=2048,I=1024,T=4,r=1,alpha=1")
    inputs = make_inputs(case)
    tokens = changed(inputs, expert_ids=torch.arange(4)[:, None], weights=torch.ones(4, 1))
    # the first round is not measured: it loads libraries and starts workers
    for measured, (label, kind) in enumerate([*list(KINDS.items())[-1:], *KINDS.items()]):
        layer = bare_of(target, kind, case)
        layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
        layer.clear_sft_buffer_cache()
        before = hosted.resident()
        given = _constant(kind, case)
        size = sum(one.nbytes for one in _tensors(given))
        layer.load_weights_from_tensors(**given)
        del given
        layer.forward_sft(tokens.hidden_states, tokens.expert_ids, tokens.weights, save_for_backward=False)
        layer.clear_sft_buffer_cache()
        held = hosted.resident() - before
        text = f"{label}: {held / 1e6:.1f} MB are held for {size / 1e6:.1f} MB of codes, scales and zero points"
        target.expect(not measured or held <= 1.05 * size, text, "resources", held / (1.05 * size))
        del layer


def _constant(kind: Kind, case: Case) -> dict[str, Any]:
    """The arguments of load_weights_from_tensors, each tensor of one value: quickly made."""
    small = draw(kind, Case.parse("E=1,k=1,H=256,I=256,T=1,r=1,alpha=1")).arguments()
    found: dict[str, Any] = {"physical_map": torch.arange(case.num_experts)}
    scales, zeros = [], []
    for position, (name, (rows, columns)) in enumerate(shapes_of(case).items()):
        code = small[name].view(torch.uint8).flatten()[0]
        size = (case.num_experts, rows, columns * kind.bits // 8)
        found[name] = torch.full(size, int(code), dtype=torch.uint8).view(small[name].dtype)
        shape = kind.scale_shape(case.num_experts, rows, columns)
        scales.append(torch.ones(shape, dtype=small["scales"][position].dtype))
        zeros.append(torch.zeros(shape, dtype=torch.int8))
    return found | {"scales": tuple(scales)} | ({"zero_points": tuple(zeros)} if kind.zeros else {})


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    return [given[name] for name in BASE_NAMES] + [*given["scales"], *given.get("zero_points", ())]
