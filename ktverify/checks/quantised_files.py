"""Quantised base weights in files, as published checkpoints have them: the same bits as from tensors, and refusals."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.check import Function, Where, check
from ktverify.checks.judging import judge_refusal
from ktverify.checks.quantised_inputs import PlainCodes, bare_of, draw, layer_of
from ktverify.checks.target import Target
from ktverify.engines.checkpoint_files import INDEX
from ktverify.engines.run import run_layer
from ktverify.judge.dequantise import CODINGS, Coding, packed
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

NAMES = (
    "The tensors of a matrix are those of published checkpoints: for FP8 weight and weight_scale_inv, for INT8 weight "
    "and weight_scale, or weight_packed of 8 bits, weight_scale and weight_shape, for INT4 weight_packed, "
    "weight_scale, weight_shape and weight_zero_point where there are zero points, for MXFP4 weight and scale."
)
REFUSED = (
    "load_weights() refuses what is wrong in such files with ValueError or TypeError, in a line that names file and "
    "tensor: a tensor that is missing, there twice, of another dtype or shape, or cut short, groups that do not divide "
    "a row, the numbers that load_weights_from_tensors refuses, and a config.json that contradicts the tensors. It "
    "refuses kt-kernel's .kt files."
)
CASE = Case.parse("E=3,k=2,H=256,I=128,T=9,r=2,alpha=4")
LAYER = 3
FILE = "model.safetensors"


def tensors_of(
    coded: PlainCodes, prefix: str = f"model.layers.{LAYER}.mlp.experts.", *, packed_int8: bool = False
) -> dict[str, Tensor]:
    """The codes as a checkpoint has them, by full names. packed_int8: int8 as bytes q + 128, four in an int32."""
    coding, found = coded.coding, {}
    for name, codes in coded.codes.items():
        stored, scales = packed(coding, codes), coded.scales[name]
        for expert in range(len(codes)):
            stem = f"{prefix}{expert}.{name}."
            scale = scales[expert].contiguous()
            if coding.method == "AMXFP8_SFT":
                made = {"weight": stored[expert], "weight_scale_inv": scale}
            elif coding.method == "AMXINT8_SFT":
                made = {"weight": stored[expert], "weight_scale": scale[:, None]}
                if packed_int8:
                    words = (codes[expert] ^ 0x80).contiguous().view(torch.int32)
                    del made["weight"]
                    made |= {"weight_packed": words, "weight_shape": torch.tensor(codes[expert].shape)}
            elif coding.method == "MXFP4_SFT":
                made = {"weight": stored[expert], "scale": scale}
            else:
                shape = torch.tensor(codes[expert].shape)
                made = {"weight_packed": stored[expert], "weight_scale": scale, "weight_shape": shape}
                if coded.zeros is not None:
                    made["weight_zero_point"] = by_rows(coded.zeros[name][expert])
            found.update({stem + word: tensor.contiguous() for word, tensor in made.items()})
    return found


def by_rows(zeros: Tensor) -> Tensor:
    """int32 [⌈N / 8⌉, groups] of int8 [N, groups]: eight rows in a number, the first in its lowest bits, and 8 more."""
    rows = torch.zeros(-(-len(zeros) // 8) * 8, zeros.shape[1], dtype=torch.int64)
    rows[: len(zeros)] = zeros.long() + 8
    words = sum(rows[place::8] << (4 * place) for place in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _in_files(contract: str, cause: Cause, **more: Any) -> Callable[[Function], Function]:
    settings: dict[str, Any] = {"family": "quantised", "where": Where.OWN_CHOICE, "native": True, "internal": True}
    return check("quantised_files", contract, cause=cause, **settings, **more)


@_in_files(NAMES, Cause.QUANTISATION, variants={f"/{label}": {"label": label} for label in CODINGS})
def check_names(target: Target, label: str) -> None:
    """A layer from a file has the bits of the layer from the tensors; also of codes and scales in two files, and of
    int8 in both of its forms."""
    coding, inputs = CODINGS[label], make_inputs(CASE)
    coded = draw(coding, CASE)
    expected = run_layer(layer_of(target, coded, CASE, inputs), inputs)
    tensors = tensors_of(coded)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(("scale", "scale_inv"))}
    rest = {name: tensor for name, tensor in tensors.items() if name not in scales}
    cases = [{FILE: tensors}, {"1.safetensors": rest, "2.safetensors": scales}]
    if label == "int8":
        cases.append({FILE: tensors_of(coded, packed_int8=True)})
    for files in cases:
        with tempfile.TemporaryDirectory() as folder:
            for name, part in files.items():
                save_file(part, Path(folder) / name)
            path = Path(folder) / FILE if len(files) == 1 else folder
            layer = bare_of(target, coding, CASE, weight_path=str(path), layer_idx=LAYER)
            layer.load_weights(inputs.physical_map)
            layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
            found = run_layer(layer, inputs)
        target.expect_same_bits(f"{label} of {len(files)} files", expected, found)


Change = Callable[[dict[str, Tensor]], object]
FIRST = f"model.layers.{LAYER}.mlp.experts.0.gate_proj."
LAST = f"model.layers.{LAYER}.mlp.experts.2.down_proj."


def _to(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def _without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def _also(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


def _renamed(old: str, new: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _in_bf16(stem: str) -> Change:
    """One matrix of int4 in bf16, without its codes."""

    def change(tensors: dict[str, Tensor]) -> None:
        shape = tensors.pop(f"{stem}weight_shape").tolist()
        for word in ("weight_packed", "weight_scale"):
            del tensors[stem + word]
        tensors[f"{stem}weight"] = torch.ones(shape, dtype=torch.bfloat16)

    return change


def _one(value: float, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """A copy with this value at the end; of bytes where a dtype is given, which the copy then has."""

    def change(tensor: Tensor) -> Tensor:
        found = tensor.clone() if dtype is None else tensor.clone().view(torch.uint8)
        found.view(-1)[-1] = value
        return found if dtype is None else found.view(dtype)

    return change


@dataclass(frozen=True)
class Bad:
    """Files that are refused. names: what the error contains, beside the file. config: quantization_config beside.
    packed_int8: as tensors_of takes it."""

    label: str
    change: Change
    names: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    packed_int8: bool = False


def _says(label: str, names: tuple[str, ...], **config: Any) -> Bad:
    """Good tensors beside a config.json that contradicts them."""
    return Bad(label, lambda _: None, names, config)


def _integers(label: str, names: tuple[str, ...], **weights: Any) -> Bad:
    """The same, of compressed-tensors' integers in groups of 32."""
    said = {"type": "int", "num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, **weights}
    return _says(label, (f"{FIRST}weight_packed", *names), config_groups={"group_0": {"weights": said}})


EXPERT = f"model.layers.{LAYER}.mlp.experts.1"
E4M3 = torch.float8_e4m3fn
ROWS = {
    "fp8 scale missing": Bad("fp8", _without(f"{LAST}weight_scale_inv"), (f"{LAST}weight_scale_inv",)),
    "fp8 scale of rows": Bad("fp8", _to(f"{FIRST}weight_scale_inv", lambda s: s[:, :1]), (f"{FIRST}weight_", "[1, 2]")),
    "fp8 scale of bytes": Bad("fp8", _to(f"{FIRST}weight_scale_inv", Tensor.byte), (f"{FIRST}weight_scale_inv", "U8")),
    "fp8 scale NaN": Bad("fp8", _to(f"{LAST}weight_scale_inv", _one(float("nan"))), (f"{LAST}weight_scale_inv", "nan")),
    "fp8 code 0x7F": Bad("fp8", _to(f"{LAST}weight", _one(0x7F, E4M3)), (f"{LAST}weight: [255, 127]", "NaN")),
    "fp8 code 0xFF": Bad("fp8", _to(f"{FIRST}weight", _one(0xFF, E4M3)), (f"{FIRST}weight: [127, 255]", "NaN")),
    "fp8 codes of e5m2": Bad(
        "fp8", _to(f"{LAST}weight", lambda w: w.view(torch.float8_e5m2)), (f"{LAST}weight is F8_E5M2",)
    ),
    "fp8 codes missing": Bad("fp8", _without(f"{LAST}weight"), (f"{LAST}weight",)),
    "fp8 of another width": Bad("fp8", _to(f"{LAST}weight", lambda w: w[:, :-1]), (f"{LAST}weight", "[256, 127]")),
    "int8 scale missing": Bad("int8", _without(f"{LAST}weight_scale"), (f"{LAST}weight_scale",)),
    "int8 scale of columns": Bad("int8", _to(f"{FIRST}weight_scale", lambda s: s.T), (f"{FIRST}weight_scale", "[128]")),
    "int8 scale infinite": Bad("int8", _to(f"{LAST}weight_scale", _one(float("inf"))), (f"{LAST}weight_scale", "inf")),
    "int8 in fp8's place": Bad("fp8", _to(f"{FIRST}weight", lambda w: w.view(torch.int8)), (f"{FIRST}weight", "int8")),
    "int4 scale missing": Bad("int4_32", _without(f"{LAST}weight_scale"), (f"{LAST}weight_scale",)),
    "int4 group that does not divide": Bad(
        "int4_32", _to(f"{FIRST}weight_scale", lambda s: s[:, :3]), (f"{FIRST}weight_scale", "do not divide", "256")
    ),
    "int4 group of 64": Bad(
        "int4_32", _to(f"{FIRST}weight_scale", lambda s: s[:, ::2]), (f"{FIRST}weight_scale", "64", "32 or 128")
    ),
    "int4 of two groups": Bad(
        "int4_32", _to(f"{LAST}weight_scale", lambda s: s[:, ::4]), (f"{LAST}weight_scale", "128", "32")
    ),
    "int4 scale below 0": Bad("int4_32", _to(f"{LAST}weight_scale", _one(-1.0)), (f"{LAST}weight_scale", "-1")),
    "int4 scales of two dtypes": Bad(
        "int4_32", _to(f"{LAST}weight_scale", Tensor.float), (f"{LAST}weight_scale is float32", "bfloat16")
    ),
    "int4 scales of fp64": Bad("int4_fp32", _to(f"{FIRST}weight_scale", Tensor.double), (FIRST, "F64", "F16")),
    "int8 with zero points": Bad(
        "int8",
        _also(f"{LAST}weight_zero_point", torch.zeros(256, 1, dtype=torch.int8)),
        (f"{LAST}weight_zero_point",),
    ),
    "one expert in bf16": Bad("int4_32", _in_bf16(LAST), (f"{LAST}weight is BF16", "int4")),
    "int4 codes of bytes": Bad("int4_32", _to(f"{LAST}weight_packed", lambda c: c.view(torch.uint8)), (LAST, "U8")),
    "int4 of another shape": Bad("int4_32", _to(f"{LAST}weight_shape", lambda s: s + 8), (f"{LAST}weight_shape",)),
    "int4 shape missing": Bad("int4_32", _without(f"{LAST}weight_shape"), (f"{LAST}weight_shape",)),
    "packed int8 shape missing": Bad(
        "int8", _without(f"{FIRST}weight_shape"), (f"{FIRST}weight_packed has no", "weight_shape"), packed_int8=True
    ),
    "packed int8 of another shape": Bad(
        "int8",
        _to(f"{FIRST}weight_shape", lambda s: s + 64),
        (f"{FIRST}weight_packed", "says [192, 320]"),
        packed_int8=True,
    ),
    "packed int8 shape of fp32": Bad(
        "int8", _to(f"{FIRST}weight_shape", Tensor.float), (f"{FIRST}weight_shape is F32",), packed_int8=True
    ),
    "int4 in another order": Bad("int4_32", _also(f"{LAST}weight_g_idx", torch.arange(128)), (f"{LAST}weight_g_idx",)),
    "int4 zero points missing": Bad("int4_zeros", _without(f"{LAST}weight_zero_point"), (f"{LAST}weight_zero_point",)),
    "int4 zero points of columns": Bad(
        "int4_zeros", _to(f"{LAST}weight_zero_point", lambda z: z[:, :-1]), (f"{LAST}weight_zero_point", "I32 [32, 4]")
    ),
    "int4 zero points of one matrix": Bad(
        "int4_32",
        _also(f"{LAST}weight_zero_point", torch.zeros(32, 4, dtype=torch.int32)),
        (f"{LAST}weight_zero_point",),
    ),
    "mxfp4 scale 0xFF": Bad("mxfp4", _to(f"{LAST}scale", _one(0xFF)), (f"{LAST}scale: [255, 3]", "NaN")),
    "mxfp4 scale missing": Bad("mxfp4", _without(f"{LAST}scale"), (f"{LAST}scale",)),
    "mxfp4 scale of 64": Bad("mxfp4", _to(f"{FIRST}scale", lambda s: s[:, ::2]), (f"{FIRST}scale", "[128, 8]")),
    "mxfp4 scale of fp32": Bad("mxfp4", _to(f"{FIRST}scale", Tensor.float), (f"{FIRST}scale", "F32")),
    "int4 beside bf16": Bad(
        "int4_32",
        _also(f"{LAST}weight", torch.ones(256, 128, dtype=torch.bfloat16)),
        (f"{LAST}weight is there", f"{LAST}weight_packed"),
    ),
    "int4 in half of the numbers": Bad("int4_32", _to(f"{LAST}weight_packed", lambda c: c[:, ::2]), (LAST, "[256, 8]")),
    "int4 codes of int64": Bad("int4_32", _to(f"{LAST}weight_packed", Tensor.long), (f"{LAST}weight_packed is I64",)),
    "int4 scales transposed": Bad("int4_32", _to(f"{FIRST}weight_scale", lambda s: s.T), (f"{FIRST}weight_scale",)),
    "fp8 scales transposed": Bad(
        "fp8", _to(f"{LAST}weight_scale_inv", lambda s: s.T), (f"{LAST}weight_scale_inv", "[1, 2]")
    ),
    "int8 codes without a sign": Bad("int8", _to(f"{LAST}weight", lambda w: w.view(torch.uint8)), (LAST, "is U8")),
    "a scale of no dimension": Bad("int8", _to(f"{LAST}weight_scale", lambda s: s[0, 0]), (LAST, "F32 []")),
    "config.json of 8 bits": _integers("int4_32", ("'num_bits': 8",), num_bits=8),
    "config.json of groups of 128": _integers("int4_32", ("a scale for 32", "'group_size': 128"), group_size=128),
    "config.json of rows": _integers("int4_32", ("'strategy': 'channel'",), strategy="channel", group_size=None),
    "config.json of zero points": _integers("int4_32", ("without zero points",), symmetric=False),
    "config.json of no zero points": _integers("int4_zeros", ("with zero points",)),
    "config.json of another order": _integers("int4_32", ("actorder",), actorder="group"),
    "int4 shape transposed": Bad(
        "int4_32", _to(f"{FIRST}weight_shape", lambda s: s.flip(0)), (FIRST, "says [256, 128]")
    ),
    "config.json of integers beside fp8": _says(
        "fp8",
        (f"{FIRST}weight is fp8", "'num_bits': 8"),
        config_groups={"a": {"weights": {"type": "int", "num_bits": 8}}},
    ),
    "config.json of e5m2": _says("fp8", (f"{FIRST}weight is fp8", "e5m2"), fmt="e5m2"),
    "config.json of blocks of 64": _says("fp8", (f"{FIRST}weight", "[64, 64]"), weight_block_size=[64, 64]),
    "config.json of mxfp4 beside fp8": _says("fp8", (f"{FIRST}weight is fp8", "'mxfp4'"), quant_method="mxfp4"),
    "config.json of fp8 beside int4": _says("int4_32", (f"{FIRST}weight_packed is int4", "'fp8'"), quant_method="fp8"),
    "config.json that leaves an expert out": _says(
        "int4_32", (f"{EXPERT}.up_proj.weight_packed", "ignore has"), ignore=["lm_head", f"{EXPERT}.up_proj"]
    ),
    "config.json with a pattern of experts": _says(
        "int4_32", (f"{FIRST}weight_packed", "ignore has re:"), ignore=[r"re:.*mlp\.experts\..*"]
    ),
    "config.json that leaves a layer out": _says(
        "fp8", (f"{FIRST}weight", "modules_to_not_convert"), modules_to_not_convert=[f"model.layers.{LAYER}.mlp"]
    ),
    "int8 codes of fp16": Bad("int8", _to(f"{FIRST}weight", Tensor.half), (FIRST, "F16", "AMXINT8_SFT", "I8")),
    "int4 by GPTQ's names": Bad("int4_32", _renamed("weight_packed", "qweight"), ("_proj.qweight is of GPTQ",)),
    "an expert too many": Bad(
        "int4_128", _also(FIRST.replace("0.gate", "3.gate") + "weight_packed", torch.ones(1)), ()
    ),
}


@_in_files(REFUSED, Cause.REFUSAL, gates=("refusal",))
def check_refused(target: Target) -> None:
    """Every row of ROWS, a file that was cut short, has a tensor twice or is not there, fp32 weights, and .kt files,
    are refused in one line."""
    for name, row in ROWS.items():
        tensors = tensors_of(draw(CODINGS[row.label], CASE), packed_int8=row.packed_int8)
        row.change(tensors)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            save_file(tensors, path)
            if row.config is not None:
                path.with_name("config.json").write_text(json.dumps({"quantization_config": row.config}))
            # an expert too many is a fault of no single tensor
            _refused(target, CODINGS[row.label], path, name, (FILE, *row.names))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        save_file(tensors_of(draw(CODINGS["fp8"], CASE)), path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        _refused(
            target, CODINGS["fp8"], path, "a file cut short", (FILE, "safetensors", "experts.2.up_proj.weight ends")
        )
        path.write_bytes(_twice(whole, f"{LAST}weight"))
        _refused(target, CODINGS["fp8"], path, "a tensor that is there twice", (FILE, f"{LAST}weight is in", "twice"))
        files = dict.fromkeys(tensors_of(draw(CODINGS["fp8"], CASE)), "model-2.safetensors")
        (path.parent / INDEX).write_text(json.dumps({"weight_map": files}))
        _refused(target, CODINGS["fp8"], path.parent, "a file that is not there", (INDEX, f"{FIRST}weight", "model-2"))
        save_file({f"{FIRST.replace('gate_proj', name)}weight": torch.zeros(1, 1) for name in BASE_NAMES}, path)
        _refused(target, CODINGS["fp8"], path, "fp32 weights", (FILE, f"{FIRST}weight", "F32"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "INT4_down_0_1024Byte_quant_.kt"
        path.write_bytes(b"codes")
        for each in (path, path.parent):
            _refused(target, CODINGS["int4_32"], each, "kt-kernel's files", (str(each), ".kt files", "safetensors"))


def _twice(file: bytes, name: str) -> bytes:
    """A safetensors file whose header has this tensor twice, with the same place."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = file[8:end].decode().rstrip()
    again = json.dumps({name: json.loads(header)[name]})[1:]
    changed = f"{header[:-1]},{again}".encode()
    return len(changed).to_bytes(8, "little") + changed + file[end:]


def _refused(target: Target, coding: Coding, path: Path, what: str, names: tuple[str, ...]) -> None:
    layer = bare_of(target, coding, CASE, weight_path=str(path), layer_idx=LAYER)
    try:
        layer.load_weights()
    except (ValueError, TypeError) as error:
        judge_refusal(target, what, error, (ValueError, TypeError), names)
    else:
        target.accepted(f"{what}:")
