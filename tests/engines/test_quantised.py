"""Quantised base weights of the native engine: every code with extreme scales, copies, and what other engines say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ktverify.checks.quantised_inputs import PlainCodes, as_bf16, draw, layer_of
from ktverify.checks.target import Target, same_bits
from ktverify.engines.native.isa import available_isas
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import layer_arguments, run_layer
from ktverify.errors import Unsupported
from ktverify.judge.dequantise import CODINGS, NAN_CODES
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES

CASE = Case.parse("E=2,k=1,H=256,I=128,T=3,r=2,alpha=4")
# from a product that is subnormal to one that is infinite
EXPONENTS = (-149, -133, -127, -20, 0, 100, 127)


def _every_code(label: str) -> PlainCodes:
    """Weight n of a matrix has code n; scales go through EXPONENTS, and not all are powers of two."""
    coding, drawn = CODINGS[label], draw(CODINGS[label], CASE)
    codes, scales = {}, {}
    for start, (name, tensor) in enumerate(drawn.codes.items()):
        number = torch.arange(tensor.numel()) % (1 << coding.bits)
        if label == "fp8":
            number[(number == NAN_CODES[0]) | (number == NAN_CODES[1])] = 0
        codes[name] = number.to(torch.uint8).view(tensor.shape)
        scale = drawn.scales[name]
        # fp8 has four scales a matrix
        turn = torch.tensor(EXPONENTS)[(torch.arange(scale.numel()) + 3 * start) % len(EXPONENTS)].view(scale.shape)
        if label == "mxfp4":
            scales[name] = (turn + 127).clamp(0, 254).to(torch.uint8)
        else:
            most = torch.finfo(scale.dtype).max
            scales[name] = (2.0 ** turn.double() * (1 + 0.3 * (turn % 2))).clamp(max=most).to(scale.dtype)
    return PlainCodes(coding, codes, scales, drawn.zeros)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("label", CODINGS)
def test_base_weights_are_those_of_the_codes_bit_for_bit(label: str, isa: str) -> None:
    coded, inputs = _every_code(label), make_inputs(CASE)
    layer = layer_of(Target("native", isa), coded, CASE, inputs)
    expected = coded.weights()
    # a product with the largest fp16 is finite
    assert label == "int4_fp16" or any(bool(weight.isinf().any()) for weight in expected.values())
    # before the experts are packed, and of packed ones
    for _ in range(2):
        found = layer.base_weights()
        assert all(same_bits(found[name], expected[name]) for name in BASE_NAMES)
        layer.forward_sft(inputs.hidden_states, torch.tensor([[0], [1], [0]]), inputs.weights, save_for_backward=False)
    assert layer.packed_experts == 2


def test_a_copy_gives_the_same_bits() -> None:
    coded, inputs = draw(CODINGS["fp8"], CASE), make_inputs(CASE)
    layer = layer_of(Target("native"), coded, CASE, inputs)
    expected, found = run_layer(layer, inputs), run_layer(copy.deepcopy(layer), inputs)
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


def test_moved_and_not_contiguous_tensors_are_read_where_they_are() -> None:
    coding, inputs = CODINGS["int4_zeros"], make_inputs(CASE)
    coded = draw(coding, CASE)
    given: dict[str, Any] = coded.arguments()
    given["gate_proj"] = given["gate_proj"].transpose(1, 2).contiguous().transpose(1, 2)
    layer = KTMoEWrapper(**layer_arguments(CASE, method=coding.method))
    layer.load_weights_from_tensors(**given)
    layer.init_lora_weights(*inputs.lora.values())
    for tensor in (given["up_proj"], *given["scales"]):
        tensor.share_memory_()
    expected = Target("native").run(CASE, as_bf16(coded, inputs))
    found = run_layer(layer, inputs)
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("engine", ["torch_bf16", "torch_grouped_mm", "examples/engine_outside/my_engine.py:Engine"])
def test_an_engine_without_the_method_is_unsupported(engine: str) -> None:
    with pytest.raises((Unsupported, NotImplementedError), match="AMXFP8_SFT"):
        layer_of(Target(engine), draw(CODINGS["fp8"], CASE), CASE, make_inputs(CASE))


def test_bf16_takes_no_scales() -> None:
    inputs = make_inputs(CASE)
    layer = KTMoEWrapper(**layer_arguments(CASE))
    gate, up, down = (getattr(inputs, name) for name in BASE_NAMES)
    with pytest.raises(TypeError, match="scales or zero_points were given; method AMXBF16_SFT takes bf16"):
        layer.load_weights_from_tensors(gate, up, down, inputs.physical_map, scales=(gate, up, down))


def test_weights_that_are_no_numbers_are_not_quantised() -> None:
    inputs = make_inputs(CASE)
    layer = KTMoEWrapper(**layer_arguments(CASE, method="AMXINT8_SFT"))
    inputs.up_proj[1, 5, 7] = float("nan")
    gate, up, down = (getattr(inputs, name) for name in BASE_NAMES)
    with pytest.raises(ValueError, match=r"up_proj: \[1, 5, 7\] is nan; it takes finite weights"):
        layer.load_weights_from_tensors(gate, up, down, inputs.physical_map)
