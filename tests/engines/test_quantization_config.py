"""quantization_config in a config.json: those of published checkpoints are taken, malformed ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ktverify.checks.quantised_files import LAYER, tensors_of
from ktverify.checks.quantised_inputs import draw
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import layer_arguments
from ktverify.judge.dequantise import CODINGS
from ktverify.spec.cases import Case

CASE = Case.parse("E=3,k=2,H=128,I=128,T=9,r=2,alpha=4")
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
WEIGHTS: dict[str, Any] = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4, "observer": "minmax",
    "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
}  # fmt: skip


def in_groups(weights: object, **more: Any) -> dict[str, Any]:
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **more,
    }


def with_weights(**weights: Any) -> dict[str, Any]:
    return in_groups({**WEIGHTS, **weights})


Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A folder with the codes of this label, or with bf16, and this config.json."""
    folders: dict[str, Path] = {}

    def folder_of(label: str, document: object) -> Path:
        if label not in folders:
            folders[label] = tmp_path_factory.mktemp(label)
            stem = f"model.layers.{LAYER}.mlp.experts"
            plain = {
                f"{stem}.{expert}.{name}.weight": torch.ones(128, 128, dtype=torch.bfloat16)
                for expert in range(CASE.num_experts)
                for name in ("gate_proj", "up_proj", "down_proj")
            }
            save_file(
                plain if label == "bf16" else tensors_of(draw(CODINGS[label], CASE)),
                folders[label] / "model.safetensors",
            )
        (folders[label] / "config.json").write_text(json.dumps(document))
        return folders[label]

    return folder_of


def load(path: Path, method: str) -> None:
    KTMoEWrapper(**layer_arguments(CASE, method=method, weight_path=str(path), layer_idx=LAYER)).load_weights()


TAKEN: dict[str, tuple[str, object]] = {
    "DeepSeek-V3": ("fp8", FP8),
    "Qwen3": ("fp8", {**FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}),
    "MiniMax-M2": (
        "fp8",
        {**FP8, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
    ),
    "DeepSeek-V4": ("mxfp4", {**FP8, "scale_fmt": "ue8m0"}),
    "MXFP4": ("mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": None}),
    "Kimi-K2-Thinking": ("int4_32", in_groups(WEIGHTS)),
    "groups that quantise no weights": (
        "int4_32",
        in_groups(WEIGHTS, config_groups={"a": {"weights": None}, "b": {"weights": WEIGHTS}}),
    ),
    "INT8 of rows": (
        "int8",
        in_groups({**WEIGHTS, "num_bits": 8, "strategy": "channel", "group_size": None}, format="int-quantized"),
    ),
    "INT8 of rows, as -1": (
        "int8",
        in_groups({**WEIGHTS, "num_bits": 8, "strategy": "channel", "group_size": -1}, format="int-quantized"),
    ),
    "zero points": ("int4_zeros", with_weights(symmetric=False)),
    "a method that is not known": ("int8", {"quant_method": "w8a8_int8", "weight_block_size": "none"}),
    "no method": ("int4_32", {"config_groups": {"group_0": {"weights": WEIGHTS}}}),
    "an empty object": ("fp8", {}),
    "null": ("fp8", None),
    "null beside bf16": ("bf16", None),
    "the method of codes that are bf16 now": ("bf16", FP8),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("inner", [False, True])
def test_what_describes_the_tensors_is_taken(saved: Saved, name: str, inner: bool) -> None:
    label, about = TAKEN[name]
    document = {"quantization_config": about}
    path = saved(label, {"text_config": document} if inner else document)
    load(path, "AMXBF16_SFT" if label == "bf16" else CODINGS[label].method)


OBJECT, SIZE = "it takes an object", "it takes a whole number above 0"
BLOCK = "it takes two whole numbers above 0, the rows and columns of a block"
AT, GROUP = "quantization_config", "quantization_config.config_groups['group_0']"
REFUSED: dict[str, tuple[object, str]] = {
    "a string": ("compressed-tensors", f"{AT} is 'compressed-tensors'; {OBJECT}"),
    "an empty string": ("", f"{AT} is ''; {OBJECT}"),
    "a list": ([FP8], f"{AT} is [{{'activation_scheme'"),
    "an empty list": ([], f"{AT} is []; {OBJECT}"),
    "a number": (4, f"{AT} is 4; {OBJECT}"),
    "false": (False, f"{AT} is False; {OBJECT}"),
    "method null": ({**FP8, "quant_method": None}, f"{AT}.quant_method is null; it takes a string, as 'fp8'"),
    "method of a number": ({**FP8, "quant_method": 4}, f"{AT}.quant_method is 4; it takes a string, as 'fp8'"),
    "method of a list": ({"quant_method": ["fp8"]}, f"{AT}.quant_method is ['fp8']; it takes a string, as 'fp8'"),
    "fp8 with groups": (
        in_groups(WEIGHTS, quant_method="fp8"),
        f"{AT}.quant_method is 'fp8', and config_groups is there; beside config_groups it takes 'compressed-tensors'",
    ),
    "mxfp4 with blocks": (
        {**FP8, "quant_method": "mxfp4"},
        f"{AT}.quant_method is 'mxfp4', and weight_block_size is there; beside weight_block_size it takes 'fp8'",
    ),
    "groups null": (in_groups(WEIGHTS, config_groups=None), f"{AT}.config_groups is null; {OBJECT}"),
    "groups in a list": (in_groups(WEIGHTS, config_groups=[4]), f"{AT}.config_groups is [4]; {OBJECT}"),
    "a group null": (in_groups(WEIGHTS, config_groups={"group_0": None}), f"{GROUP} is null; {OBJECT}"),
    "a group of names": (
        in_groups(WEIGHTS, config_groups={"group_0": ["Linear"]}),
        f"{GROUP} is ['Linear']; {OBJECT}",
    ),
    "a name of two lines": (
        in_groups(WEIGHTS, config_groups={"a\nb": 1}),
        f"{AT}.config_groups['a\\nb'] is 1; {OBJECT}",
    ),
    "weights of a string": (in_groups("int4"), f"{GROUP}.weights is 'int4'; {OBJECT}"),
    "weights in a list": (in_groups([WEIGHTS]), f"{GROUP}.weights is [{{'actorder': None"),
    "bits of a string": (with_weights(num_bits="4"), f"{GROUP}.weights.num_bits is '4'; {SIZE}"),
    "bits true": (with_weights(num_bits=True), f"{GROUP}.weights.num_bits is True; {SIZE}"),
    "bits of a fraction": (with_weights(num_bits=4.0), f"{GROUP}.weights.num_bits is 4.0; {SIZE}"),
    "no bits": (with_weights(num_bits=0), f"{GROUP}.weights.num_bits is 0; {SIZE}"),
    "groups of 0": (with_weights(group_size=0), f"{GROUP}.weights.group_size is 0; {SIZE}, or -1 for a whole row"),
    "groups of -2": (with_weights(group_size=-2), f"{GROUP}.weights.group_size is -2; {SIZE}, or -1"),
    "groups of -1": (with_weights(group_size=-1), f"{GROUP}.weights.group_size is -1; {SIZE} with strategy 'group'"),
    "groups of a string": (with_weights(group_size="32"), f"{GROUP}.weights.group_size is '32'; {SIZE}"),
    "groups true": (with_weights(group_size=True), f"{GROUP}.weights.group_size is True; {SIZE}"),
    "symmetric of a string": (with_weights(symmetric="yes"), f"{GROUP}.weights.symmetric is 'yes'; it takes true or"),
    "type of a number": (with_weights(type=4), f"{GROUP}.weights.type is 4; it takes a string"),
    "strategy in a list": (with_weights(strategy=["group"]), f"{GROUP}.weights.strategy is ['group']; it takes a str"),
    "actorder of a number": (with_weights(actorder=1), f"{GROUP}.weights.actorder is 1; it takes a string, or true or"),
    "format in a list": (in_groups(WEIGHTS, format=["a"]), f"{AT}.format is ['a']; it takes a string"),
    "fmt of a number": ({**FP8, "fmt": 4}, f"{AT}.fmt is 4; it takes a string"),
    "one size": ({**FP8, "weight_block_size": 128}, f"{AT}.weight_block_size is 128; {BLOCK}"),
    "a pair too short": ({**FP8, "weight_block_size": [128]}, f"{AT}.weight_block_size is [128]; {BLOCK}"),
    "a pair of strings": ({**FP8, "weight_block_size": ["128", 128]}, f"{AT}.weight_block_size is ['128', 128]; "),
    "a pair with 0": ({**FP8, "weight_block_size": [128, 0]}, f"{AT}.weight_block_size is [128, 0]; {BLOCK}"),
    "a pair with true": ({**FP8, "weight_block_size": [True, 128]}, f"{AT}.weight_block_size is [True, 128]; {BLOCK}"),
    "a pair in an object": ({**FP8, "weight_block_size": {"rows": 1}}, f"{AT}.weight_block_size is {{'rows': 1}}; "),
    "left out in a string": (
        {**FP8, "modules_to_not_convert": "lm_head"},
        f"{AT}.modules_to_not_convert is 'lm_head'; it takes a list of names of modules",
    ),
    "left out by number": (in_groups(WEIGHTS, ignore=[4]), f"{AT}.ignore is [4]; it takes a list of names of modules"),
    "no pattern": (
        in_groups(WEIGHTS, ignore=["re:["]),
        f"{AT}.ignore has 're:['; after re: it takes a regular expression (unterminated character set at position 0)",
    ),
}


@pytest.mark.parametrize("label", ["bf16", "fp8", "int4_32"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_malformed_is_one_line_whatever_the_tensors_are(saved: Saved, name: str, label: str) -> None:
    about, text = REFUSED[name]
    path = saved(label, {"quantization_config": about})
    with pytest.raises(ValueError) as refused:
        load(path, "AMXBF16_SFT" if label == "bf16" else CODINGS[label].method)
    assert str(refused.value).startswith(f"{path / 'config.json'}: {text}")
    assert "\n" not in str(refused.value)


def test_that_of_the_text_model_is_named(saved: Saved) -> None:
    path = saved("fp8", {"quantization_config": FP8, "text_config": {"quantization_config": "fp8"}})
    with pytest.raises(
        ValueError, match=r"/config\.json: text_config\.quantization_config is 'fp8'; it takes an object"
    ):
        load(path, "AMXFP8_SFT")


@pytest.mark.parametrize(
    ("label", "about", "text"),
    [
        ("fp8", {"quant_method": "mxfp4"}, "says quant_method 'mxfp4', and fp8 takes 'fp8' or 'compressed-tensors'"),
        ("fp8", {"quant_method": "gptq", "bits": 8}, "says quant_method 'gptq', and fp8 takes 'fp8' or 'compressed-te"),
        ("fp8", in_groups(WEIGHTS), "says {'num_bits': 4, "),
        ("int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes', and int8 takes 'compressed-"),
        ("int8", FP8, "says quant_method 'fp8', and int8 takes 'compressed-tensors'"),
        ("int8", in_groups({"num_bits": 8, "strategy": "group", "group_size": -1, "type": "int"}), "group_size is -1"),
        ("int4_32", FP8, "says quant_method 'fp8', and int4 takes 'compressed-tensors'"),
        ("int4_32", {"quant_method": "mxfp4"}, "says quant_method 'mxfp4', and int4 takes 'compressed-tensors'"),
        ("int4_32", {"quant_method": "awq", "bits": 4}, "says quant_method 'awq', and int4 takes 'compressed-tensors'"),
        ("int4_32", in_groups({"num_bits": 4, "group_size": -1, "type": "int"}), "'group_size': -1"),
        ("int4_32", with_weights(type="float"), "says type 'float' in config_groups, and it takes 'int'"),
        ("int4_32", with_weights(actorder=True), "says actorder: columns in another order"),
        ("mxfp4", in_groups({**WEIGHTS, "type": "float"}), "'compressed-tensors', and mxfp4 takes 'fp8' or 'mxfp4'"),
    ],
)
def test_what_contradicts_the_tensors_is_one_line(saved: Saved, label: str, about: dict[str, Any], text: str) -> None:
    path = saved(label, {"quantization_config": about})
    with pytest.raises(ValueError) as refused:
        load(path, CODINGS[label].method)
    assert text in str(refused.value)
    assert str(path / "config.json") in str(refused.value)
    assert "\n" not in str(refused.value)
