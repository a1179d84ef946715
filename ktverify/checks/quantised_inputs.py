"""Quantised base weights for checks: drawn ones, and small ones by which an engine's weights can be read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import changed
from ktverify.checks.target import Target
from ktverify.engines.run import METHOD, layer_arguments
from ktverify.errors import Unsupported
from ktverify.isolation.calls import CONSTRUCTOR, call_of
from ktverify.judge.dequantise import NAN_CODES, VALUES, Coding, packed, weights_of
from ktverify.spec.cases import Case
from ktverify.spec.generator import case_key, hashes
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES


@dataclass(frozen=True)
class PlainCodes:
    """Base weights of one coding, by BASE_NAMES and logical expert: uint8 codes [E, N, K], one for each weight; scales,
    and zeros where the coding has them, as an engine takes them."""

    coding: Coding
    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    zeros: dict[str, Tensor] | None

    def weights(self) -> dict[str, Tensor]:
        """The bf16 weights that they stand for."""
        return {
            name: weights_of(self.coding, codes, self.scales[name], None if self.zeros is None else self.zeros[name])
            for name, codes in self.codes.items()
        }

    def arguments(self, physical_map: Tensor | None = None) -> dict[str, Any]:
        """The arguments of load_weights_from_tensors, by name."""
        slots = torch.arange(len(next(iter(self.codes.values())))) if physical_map is None else physical_map
        found: dict[str, Any] = {name: packed(self.coding, codes[slots]) for name, codes in self.codes.items()}
        found |= {"physical_map": slots, "scales": tuple(scale[slots].contiguous() for scale in self.scales.values())}
        if self.zeros is not None:
            found["zero_points"] = tuple(zero[slots].contiguous() for zero in self.zeros.values())
        return found


def shapes_of(case: Case) -> dict[str, tuple[int, int]]:
    """[N, K] of the base matrices."""
    h, i = case.hidden, case.intermediate
    return {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}


def draw(coding: Coding, case: Case) -> PlainCodes:
    """Codes of all values, the same on every machine, with scales that make weights of about 1 / sqrt(K).

    Scales differ by up to a factor of 4 and have mantissas of their dtype, none for mxfp4.
    """
    codes, scales, zeros = {}, {}, {}
    spread = torch.tensor(VALUES[coding.method])
    finite = [code for code in range(1 << coding.bits) if coding.label != "fp8" or code not in NAN_CODES]
    table = torch.tensor(finite, dtype=torch.uint8)
    for name, (rows, columns) in shapes_of(case).items():

        def drawn(what: str, shape: tuple[int, ...], most: int, name: str = name) -> Tensor:
            numbers = hashes(case_key(case, f"{coding.label} {what} of {name}"), torch.Size(shape).numel())
            return torch.from_numpy((numbers >> 33).astype("int64")).view(shape) % most

        codes[name] = table[drawn("codes", (case.num_experts, rows, columns), len(finite))]
        shape = coding.scale_shape(case.num_experts, rows, columns)
        typical = columns**-0.5 / float(spread[finite].square().mean().sqrt())
        scale = typical * 2.0 ** (drawn("scales", shape, 1 << 20).double() / (1 << 19) - 1)
        if coding.label == "mxfp4":
            scales[name] = (127 + scale.log2().round()).to(torch.uint8)
        else:
            scales[name] = scale.to(coding.scales)
        if coding.zeros:
            zeros[name] = (drawn("zeros", shape, 16) - 8).to(torch.int8)
    return PlainCodes(coding, codes, scales, zeros or None)


def bare_of(target: Target, coding: Coding, case: Case, **more: Any) -> Any:
    """A layer for this coding without weights; Unsupported where the engine does not know the method."""
    method = coding.method + target.method.removeprefix(METHOD)
    with call_of(CONSTRUCTOR):
        try:
            return target.factory(**layer_arguments(case, **{**target.how, **more, "method": method}))
        except ValueError as error:
            # docs/contract.md: an unknown method is refused, and the error lists the known ones
            if method in str(error):
                raise Unsupported(f"method {method}: {error}") from error
            raise


def layer_of(target: Target, coded: PlainCodes, case: Case, inputs: Inputs, **more: Any) -> Any:
    """A layer with these codes and the LoRA of `inputs`."""
    layer = bare_of(target, coded.coding, case, **more)
    with call_of("load_weights_from_tensors"):
        layer.load_weights_from_tensors(**coded.arguments(inputs.physical_map))
    with call_of("init_lora_weights"):
        layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
    return layer


def as_bf16(coded: PlainCodes, inputs: Inputs) -> Inputs:
    """`inputs` with the bf16 weights that the codes stand for."""
    return changed(inputs, **coded.weights())


# ---- one-hot rows: a result whose rows are rows or columns of one matrix, exactly

# silu(32) is 32 and its derivative 1, in fp32 and in bf16; a power of two changes no mantissa
GATE = 5


@dataclass(frozen=True)
class Reading:
    """How one matrix is read back: `coded` has it and two simple ones, `inputs` the tokens.

    result: the tensor of the layer that has it. read: of that result and of the matrix [N, K], what must be equal.
    """

    coded: PlainCodes
    inputs: Inputs
    result: str
    read: Callable[[Tensor], Tensor]
    expected: Tensor


def readings(coding: Coding, case: Case) -> dict[str, Reading]:
    """The readings of gate_proj backward, up_proj and down_proj in both directions, by what is read.

    case: one expert, H > I. Where x reaches g and u through a column of its own, it is the last one of H.
    """
    drawn = draw(coding, case)
    h, i = case.hidden, case.intermediate
    hot = {"h": torch.eye(h), "i": torch.eye(i, h)}
    last = hot["h"][-1].expand(i, h)
    diagonal = torch.eye(i, h)
    column = torch.zeros(i, h)
    column[:, -1] = 1
    wide = diagonal.T.contiguous()

    def without_last(name: str, code: int) -> PlainCodes:
        """The drawn matrix with one code in its last column, of a zero point that no code hides."""
        codes = drawn.codes[name].clone()
        codes[..., -1] = code
        zeros = drawn.zeros
        if zeros is not None:
            mended = zeros[name].clone()
            mended[..., -1] = 0
            zeros = {**zeros, name: mended}
        return replace(drawn, codes={**drawn.codes, name: codes}, zeros=zeros)

    def reading(
        name: str, x: Tensor, grad: Tensor, simple: dict[str, tuple[Tensor, int]], result: str, expected: Any,
        read: Callable[[Tensor], Tensor] = lambda found: found, of: PlainCodes = drawn,
    ) -> Reading:  # fmt: skip
        parts = {each: _simple(coding, *simple[each]) for each in simple}
        codes = {each: of.codes[each] if each == name else parts[each][0] for each in BASE_NAMES}
        scales = {each: of.scales[each] if each == name else parts[each][1] for each in BASE_NAMES}
        zeros = of.zeros
        if zeros is not None:
            zeros = {each: zeros[each] if each == name else torch.zeros_like(zeros[each]) for each in BASE_NAMES}
        coded = PlainCodes(coding, codes, scales, zeros)
        return Reading(coded, _tokens(case, x, grad), result, read, expected(coded.weights()[name][0]))

    zero_code = next(code for code, value in enumerate(VALUES[coding.method]) if value == 0)
    most = max(range(len(VALUES[coding.method])), key=lambda code: (code not in NAN_CODES, VALUES[coding.method][code]))
    up, gate = without_last("up_proj", zero_code), without_last("gate_proj", most)
    scale = float(gate.weights()["gate_proj"][0, :, -1].float().min())
    power = GATE + 3 - int(torch.tensor(scale).log2().floor())
    return {
        "down_proj forward": reading(
            "down_proj", hot["i"], torch.zeros(i, h),
            {"gate_proj": (diagonal, GATE), "up_proj": (diagonal, -GATE)}, "output", lambda w: w.T,
        ),
        "down_proj backward": reading(
            "down_proj", torch.ones(h, h), hot["h"],
            {"gate_proj": (diagonal, GATE), "up_proj": (diagonal, -GATE - 1)}, "grad_input", lambda w: w,
            lambda found: found[:, :i],
        ),
        "up_proj forward": reading(
            "up_proj", (hot["h"] + hot["h"][-1])[:-1], torch.zeros(h - 1, h),
            {"gate_proj": (column, GATE), "down_proj": (wide, -GATE)}, "output", lambda w: w.T[:-1],
            lambda found: found[:, :i], up,
        ),
        "up_proj backward": reading(
            "up_proj", last, hot["i"], {"gate_proj": (column, GATE), "down_proj": (wide, -GATE)}, "grad_input",
            lambda w: w[:, :-1], lambda found: found[:, :-1], up,
        ),
        "gate_proj backward": reading(
            "gate_proj", last * 2.0**power, hot["i"], {"up_proj": (column, -power), "down_proj": (wide, 0)},
            "grad_input", lambda w: w[:, :-1], lambda found: found[:, :-1], gate,
        ),
    }  # fmt: skip


def _simple(coding: Coding, pattern: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of one expert's matrix 2^exponent times a pattern [N, K] of 0 and 1."""
    values = VALUES[coding.method]
    one, zero = values.index(1.0), values.index(0.0)
    codes = torch.where(pattern > 0, one, zero).to(torch.uint8)[None]
    shape = coding.scale_shape(1, *pattern.shape)
    if coding.label == "mxfp4":
        return codes, torch.full(shape, 127 + exponent, dtype=torch.uint8)
    return codes, torch.full(shape, 2.0**exponent, dtype=coding.scales)


def _tokens(case: Case, x: Tensor, grad_output: Tensor) -> Inputs:
    """One slot a token, all of one expert, without LoRA."""
    inputs = make_inputs(replace(case, qlen=len(x)))
    tensors = {"hidden_states": x.to(torch.bfloat16), "grad_output": grad_output.to(torch.bfloat16)}
    lora = {name: torch.zeros_like(tensor) for name, tensor in inputs.lora.items()}
    ids = torch.zeros(len(x), 1, dtype=torch.int64)
    return changed(inputs, **tensors, **lora, expert_ids=ids, weights=torch.ones(len(x), 1))
