"""What a layer refuses of quantised base weights: in words that name the tensor, and with the old weights in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ktverify.checks.causes import Cause
from ktverify.checks.check import Check, Where, enter
from ktverify.checks.judging import judge_refusal
from ktverify.checks.quantised_inputs import bare_of, draw, layer_of, shapes_of
from ktverify.checks.target import Target
from ktverify.engines.run import run_layer
from ktverify.errors import EngineDied, Unsupported
from ktverify.judge.dequantise import CODINGS
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs

CASE = Case.parse("E=3,k=2,H=128,I=64,T=5,r=2,alpha=4")

# rows of the contract's table
SHAPE = "codes, scales or zero points of another shape, or groups that do not divide a row"
DTYPE = "… of another dtype or device, or no tensor"
MISSING = "codes without scales, or with fewer than three; zero points for a format that has none"
VALUE = "a code that is NaN; a scale that is NaN, infinite or below 0; a zero point outside −8 … 7"
MADE = "a bf16 weight that is NaN or infinite, without scales"
CUT = "a tensor-parallel part that begins inside a group of INT4 or MXFP4"

Arguments = dict[str, Any]


def _changed(group: str, position: int, change: Callable[[torch.Tensor], Any]) -> Callable[[Arguments], None]:
    """Exchange one of the three scales or zero points."""

    def act(given: Arguments) -> None:
        three = list(given[group])
        three[position] = change(three[position])
        given[group] = tuple(three)

    return act


def _with(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy whose last element has another value."""
    found = tensor.clone()
    found.view(-1)[-1] = value
    return found


def _codes(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Arguments], None]:
    return lambda given: given.update({name: change(given[name])})


def _of_bf16(name: str, value: float) -> Callable[[Arguments], None]:
    """bf16 weights without scales, of which one of matrix `name` has this value."""

    def act(given: Arguments) -> None:
        for each, shape in shapes_of(CASE).items():
            given[each] = torch.ones(CASE.num_experts, *shape, dtype=torch.bfloat16)
        given[name] = _with(given[name], value)
        del given["scales"]

    return act


@dataclass(frozen=True)
class Row:
    """Arguments of load_weights_from_tensors that are refused. errors: ValueError, and TypeError where it may be."""

    contract: str
    label: str
    act: Callable[[Arguments], None]
    mentions: tuple[str, ...]
    errors: tuple[type[Exception], ...] = (ValueError,)


EITHER = (ValueError, TypeError)
ROWS = {
    "fp8 scales of rows": Row(SHAPE, "fp8", _changed("scales", 1, lambda s: s[..., 0]), ("up_proj",)),
    "fp8 scales too few": Row(SHAPE, "fp8", _changed("scales", 2, lambda s: s[:, :0]), ("down_proj",)),
    "int8 scales of columns": Row(SHAPE, "int8", _changed("scales", 0, lambda s: s[:, :-1]), ("gate_proj",)),
    "int4 group of 64": Row(SHAPE, "int4_32", _changed("scales", 0, lambda s: s[..., ::2]), ("gate_proj", "32")),
    "int4 zero points too few": Row(SHAPE, "int4_zeros", _changed("zero_points", 2, lambda z: z[:1]), ("down_proj",)),
    "int4 codes unpacked": Row(SHAPE, "int4_32", _codes("up_proj", lambda c: c.repeat(1, 1, 8)), ("up_proj",)),
    "mxfp4 scales too few": Row(SHAPE, "mxfp4", _changed("scales", 2, lambda s: s[..., :1]), ("down_proj",)),
    "fp8 scales of bf16": Row(DTYPE, "fp8", _changed("scales", 0, lambda s: s.bfloat16()), ("gate_proj",), EITHER),
    "fp8 codes of bytes": Row(
        DTYPE, "fp8", _codes("down_proj", lambda c: c.view(torch.uint8)), ("down_proj", "float8_e4m3fn"), EITHER
    ),
    "no scales": Row(MISSING, "fp8", lambda given: given.update(scales=None), ("scales", "gate_proj"), EITHER),
    "two scales": Row(MISSING, "int8", lambda given: given.update(scales=given["scales"][:2]), ("scales",), EITHER),
    "one scale None": Row(DTYPE, "mxfp4", _changed("scales", 2, lambda _: None), ("down_proj",), EITHER),
    "zero points of int8": Row(
        MISSING, "int8", lambda given: given.update(zero_points=given["scales"]), ("zero_points",), EITHER
    ),
    "int8 of NaN": Row(MADE, "int8", _of_bf16("up_proj", float("nan")), ("up_proj", "[2, 63, 127]", "nan")),
    "int4 of Inf": Row(MADE, "int4_32", _of_bf16("gate_proj", float("-inf")), ("gate_proj", "[2, 63, 127]", "-inf")),
    "fp8 of Inf": Row(MADE, "fp8", _of_bf16("down_proj", float("inf")), ("down_proj", "[2, 127, 63]", "inf")),
    "fp8 code NaN": Row(
        VALUE,
        "fp8",
        _codes("up_proj", lambda c: _with(c.view(torch.uint8), 0xFF).view(torch.float8_e4m3fn)),
        ("up_proj", "[2, 63, 127]"),
    ),
    "mxfp4 scale NaN": Row(VALUE, "mxfp4", _changed("scales", 1, lambda s: _with(s, 0xFF)), ("up_proj", "[2, 63, 3]")),
    "fp8 scale NaN": Row(VALUE, "fp8", _changed("scales", 0, lambda s: _with(s, float("nan"))), ("gate_proj", "nan")),
    "int8 scale infinite": Row(VALUE, "int8", _changed("scales", 2, lambda s: _with(s, float("inf"))), ("down_proj",)),
    "int4 scale below 0": Row(VALUE, "int4_32", _changed("scales", 0, lambda s: _with(s, -1.0)), ("gate_proj", "-1")),
    "int4 zero point -9": Row(
        VALUE, "int4_zeros", _changed("zero_points", 1, lambda z: _with(z, -9)), ("up_proj", "-9")
    ),
    "int4 zero point 8": Row(VALUE, "int4_zeros", _changed("zero_points", 1, lambda z: _with(z, 8)), ("up_proj", "8")),
}


def check_refused(target: Target, name: str) -> None:
    """The arguments are refused in one line that names the tensor, and the layer keeps its weights."""
    row, inputs = ROWS[name], make_inputs(CASE)
    coded = draw(CODINGS[row.label], CASE)
    layer = layer_of(target, coded, CASE, inputs)
    before = run_layer(layer, inputs)
    given = coded.arguments()
    row.act(given)
    try:
        layer.load_weights_from_tensors(**given)
    except (EngineDied, Unsupported):
        raise
    except Exception as error:
        judge_refusal(target, name, error, row.errors, row.mentions)
    else:
        target.accepted(f"{name}:")
    target.expect_same_bits(f"{name}: before the refusal and after it", before, run_layer(layer, inputs))


def check_cut(target: Target, label: str) -> None:
    """A part of 48 columns is refused, with the degrees that work, and none that do not."""
    coding = CODINGS[label]
    case = Case.parse("E=1,k=1,H=32,I=96,T=1,r=1,alpha=1")
    coded = draw(coding, case)
    try:
        bare_of(target, coding, case, tp=2).load_weights_from_tensors(**coded.arguments())
    except NotImplementedError:
        raise
    except RuntimeError as error:
        judge_refusal(target, f"{label} in two parts", error, (RuntimeError,), ("96", "32"))
        named = set(map(int, re.findall(r"\d+", str(error).rpartition(":")[2])))
        target.expect(named == {1, 3}, f"degrees 1 and 3 work, the error says {error}", "refusal")
    else:
        target.accepted(f"{label} with groups that two parts share")


def _check(id: str, function: Callable[..., object], contract: str, **arguments: object) -> Check:
    return Check(
        f"quantised_refusals/{id}",
        "quantised",
        function,
        contract,
        ("refusal", "bits"),
        cause=Cause.REFUSAL,
        arguments=arguments,
        where=Where.OWN_CHOICE,
    )


enter(_check(name, check_refused, row.contract, name=name) for name, row in ROWS.items())
enter(_check(f"cut/{label}", check_cut, CUT, label=label) for label in ("int4_32", "mxfp4"))
