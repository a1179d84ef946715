"""`plan`: configurations that it takes and refuses, and what it prints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ktverify.bench.plan.memory import METHOD_OF
from ktverify.training.moe_model import read_moe_model
from tests.support.command_line import call, refused

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "vocab_size": 129280, "num_experts_per_tok": 8, "auto_map": {"AutoConfig": "configuration_deepseek.Config"},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
KIMI_K2 = {
    **V3,
    "model_type": "kimi_k2",
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("config", "layers", "experts", "billions"),
    [
        pytest.param(V3, 58, 256, 671.0, id="deepseek_v3"),
        pytest.param(KIMI_K2, 60, 384, 1026, id="kimi_k2"),
        pytest.param({"model_type": "kimi_k25", "text_config": KIMI_K2}, 60, 384, 1026, id="kimi_k25"),
    ],
)
def test_a_published_configuration_has_its_parameters(
    tmp_path: Path, config: dict[str, Any], layers: int, experts: int, billions: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = read_moe_model(tmp_path)
    assert (found.family, found.layers, found.experts, found.stored) == ("deepseek_v3", layers, experts, "fp8")
    routed = 3 * layers * experts * 7168 * 2048
    assert (found.others + routed) / 1e9 == pytest.approx(billions, rel=1e-3)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
BAD = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "twice a key": '{"model_type": "mixtral", "model_type": "mixtral"}',
    "nested too deeply": "[" * 100_000,
    "no model_type": "{}",
    "another model_type": '{"model_type": 5, "architectures": "Mixtral"}',
    "no causal language model": '{"model_type": "vit"}',
    "without experts": '{"model_type": "qwen3", "num_hidden_layers": 1, "vocab_size": 8}',
    **{
        f"{name}={value!r}"[:40]: json.dumps({**MIXTRAL, name: value})
        for name, value in (
            ("num_hidden_layers", 10**9), ("num_hidden_layers", True), ("num_hidden_layers", "2"),
            ("num_hidden_layers", 0), ("hidden_size", -8), ("hidden_size", "wide"), ("hidden_size", math.nan),
            ("hidden_size", 10**30), ("intermediate_size", 10**18), ("num_local_experts", 0),
            ("num_local_experts", 10**12), ("num_local_experts", 10**7),
            ("num_experts_per_tok", 5), ("num_experts_per_tok", "all"),
            ("num_attention_heads", 0), ("hidden_act", "gelu"), ("rope_scaling", {"type": 3}),
            ("quantization_config", {"quant_method": "fp8", "weight_block_size": "big"}),
            ("quantization_config", "fp8"), ("quantization_config", {"quant_method": 8}),
            ("quantization_config", {"quant_method": "compressed-tensors", "config_groups": {"a": None}}),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_configuration_that_is_none_is_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(BAD[name], encoding="utf-8")
    refused(call("plan", file, "--bandwidth", 10, "--peak", 100), r"^.{10,900}$")


def test_many_labels_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, "num_labels": 10**9}), encoding="utf-8")
    assert read_moe_model(tmp_path).experts == 4


def test_the_command_prints_the_verdict_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3), encoding="utf-8")
    given = {"machines": 2, "nodes": 2, "memory": 600, "bandwidth": 400, "peak": 8000, "network": 12.5, "local": 5}
    machines = [f"--{name}={value}" for name, value in given.items()]
    done = call("plan", tmp_path, *machines)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("PASS fp8: EP of 2 machines is the fastest of 2 that fit, of 4: at most ")
    assert "one process, one node" in done.stdout
    assert "GiB a machine, of 600.0" in done.stdout
    assert "400 GB/s, given" in done.stdout
    found = json.loads(call("plan", tmp_path, *machines, "--json").stdout)
    assert found["fastest"] == "EP of 2 machines"
    assert set(found["splits"]) == set(METHOD_OF)
    assert len(found["splits"]["int4"]) == 4
    assert found["splits"]["fp8"][2]["time"]["sent"] == pytest.approx(58 * 4 * 1024 * 8 * 7168 * 2 / 2)
    small = call("plan", tmp_path, *machines, "--memory", 100)
    assert small.exit_code == 1
    assert small.stdout.startswith("FAIL fp8: no split fits; ")
    gpu = call("plan", tmp_path, *machines, "--gpu-memory", 80)
    assert gpu.exit_code == 2
    assert "give --gpu-bandwidth, --gpu-peak, --gpu-link as well" in gpu.stderr
    for option, wrong, text in (
        ("--gpu-experts", 3, "--gpu-experts is given, and no GPU: give --gpu-memory as well"),
        ("--tokens", 10**12, "tokens is 1000000000000; it takes a positive number, at most 16777216"),
        ("--format", "int3", "--format is 'int3', it takes one of bf16, fp8, int8, int4, mxfp4"),
    ):
        refused(call("plan", tmp_path, *machines, option, wrong), text)
    odd = call("plan", tmp_path, *machines, "--bandwidth", "nan")
    assert odd.exit_code == 2
    assert "--bandwidth is nan; it takes a finite number" in odd.stderr


def test_what_is_not_given_is_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, "hidden_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 320}), encoding="utf-8")  # fmt: skip
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({"num_experts": [4], "gpu_experts": [[1]], "counts": [[1, 7, 0, 0]]}), encoding="utf-8")
    found = json.loads(call("plan", tmp_path, "--mask", mask, "--nodes", 2, "--json").stdout)
    for name in ("bandwidth", "peak", "local"):
        assert found["inputs"][name].endswith("measured here")
        assert found["hardware"][name] > 1e7
    assert found["hardware"]["memory"] > 1 << 30
    mask.write_text(json.dumps({"num_experts": [4], "gpu_experts": [[1]]}), encoding="utf-8")
    done = call("plan", tmp_path, "--mask", mask, "--bandwidth", 10, "--peak", 100)
    assert done.exit_code == 2
    assert "has no counts: python -m ktverify expert-stats writes them" in done.stderr
