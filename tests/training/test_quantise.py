"""quantise: routed experts as codes of the contract's rule by published names, and everything else as it was."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.quantise import codes_of
from ktverify.engines.quantised import dequantised
from ktverify.engines.run import layer_arguments
from ktverify.spec.cases import Case
from ktverify.spec.names import BASE_NAMES
from ktverify.system.text import read_json
from ktverify.training.quantise import quantise_checkpoint

INDEX = "model.safetensors.index.json"
GROUPS = {"int8": 0, "int4": 32, "fp8": 128}
MOE, EXPERT = "model.layers.1.mlp", "model.layers.1.mlp.experts.0"


def checkpoint(folder: Path, **more: Tensor) -> Path:
    """A decoder layer with two experts of [64, 160], a layer that predicts further tokens, another tower; two files."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": drawn(10, 160), "model.layers.1.self_attn.o_proj.weight": drawn(160, 160)}
    for layer in ("model.layers.1", "model.layers.2", "mtp.layers.0"):
        tensors[f"{layer}.mlp.gate.weight"] = drawn(2, 160)
        tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = drawn(2).float()
        for part in ("experts.0", "experts.1", "shared_experts"):
            tensors |= {f"{layer}.mlp.{part}.{name}.weight": drawn(64, 160) for name in ("gate_proj", "up_proj")}
            tensors[f"{layer}.mlp.{part}.down_proj.weight"] = drawn(160, 64)
    tensors["model.layers.2.eh_proj.weight"] = drawn(4, 8)
    tensors[f"{EXPERT}.gate_proj.weight"][3] = 0
    tensors |= more
    folder.mkdir()
    files = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "hidden_size": 160}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "templates").mkdir()
    (folder / "templates" / "one.jinja").write_text("{{ 1 }}")
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def is_routed(name: str) -> bool:
    return name.startswith(f"{MOE}.experts.")


def read_back(found: dict[str, Tensor], name: str, to: str, group: int) -> Tensor:
    """The weights of the codes by their published names."""
    stem = name.removesuffix("weight")
    codes = found[f"{stem}{'weight' if to == 'fp8' else 'weight_packed'}"]
    scales = found[f"{stem}{'weight_scale_inv' if to == 'fp8' else 'weight_scale'}"]
    if to == "int8":
        return ((codes.view(torch.uint8).float() - 128) * scales).bfloat16()
    return dequantised(to, group, codes, scales, None)


@pytest.mark.parametrize("to", GROUPS)
def test_routed_experts_become_codes_and_nothing_else_changes(to: str, tmp_path: Path) -> None:
    source, out, said = checkpoint(tmp_path / "plain"), tmp_path / "new" / "out", []
    written = quantise_checkpoint(source, out, to, say=lambda name, share: said.append((name, share)))
    before, after = tensors_in(source), tensors_in(out)
    for name, tensor in before.items():
        if is_routed(name):
            expected = dequantised(to, GROUPS[to], *codes_of(tensor, to, GROUPS[to]), None)
            assert torch.equal(read_back(after, name, to, GROUPS[to]), expected)
        else:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    if to != "fp8":
        assert after[f"{EXPERT}.down_proj.weight_shape"].tolist() == [160, 64]
    index = read_json(out / INDEX)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert {name: file for file in out.glob("*.safetensors") for name in load_file(file)} == {
        name: out / file for name, file in index["weight_map"].items()
    }
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "templates" / "one.jinja").read_text() == "{{ 1 }}"
    assert written.matrices == 6
    assert written.bytes_before == sum(tensor.nbytes for name, tensor in before.items() if is_routed(name))
    assert sum(written.left.values()) == sum(tensor.nbytes for name, tensor in before.items() if not is_routed(name))
    assert [share for _, share in said] == sorted(share for _, share in said)
    assert said[-1][1] == 1
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("to", GROUPS)
def test_the_engine_reads_what_was_written(to: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "plain")
    quantise_checkpoint(source, tmp_path / "out", to)
    case = Case.parse("E=2,k=1,H=160,I=64,T=1,r=1,alpha=1")
    how = layer_arguments(case, method=f"AMX{to.upper()}_SFT", layer_idx=1)
    layers = [KTMoEWrapper(**{**how, "weight_path": str(path)}) for path in (source, tmp_path / "out")]
    for layer in layers:
        layer.load_weights()
    made, read = (layer.base_weights() for layer in layers)
    assert all(torch.equal(made[name], read[name]) for name in BASE_NAMES)


def test_int4_of_128() -> None:
    weight = torch.randn(3, 256).bfloat16()
    codes, scales = codes_of(weight, "int4", 128)
    assert (codes.shape, scales.shape) == ((3, 32), (3, 2))


def test_the_configuration_names_what_is_left(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "plain")
    for to in GROUPS:
        quantise_checkpoint(source, tmp_path / to, to)
    configs = {to: read_json(tmp_path / to / "config.json") for to in GROUPS}
    assert all(config["hidden_size"] == 160 for config in configs.values())
    about = {to: config["quantization_config"] for to, config in configs.items()}
    assert (about["fp8"]["quant_method"], about["fp8"]["weight_block_size"]) == ("fp8", [128, 128])
    assert about["int8"]["format"] == about["int4"]["format"] == "pack-quantized"
    weights = {to: about[to]["config_groups"]["group_0"]["weights"] for to in ("int8", "int4")}
    assert (weights["int8"]["strategy"], weights["int8"]["num_bits"]) == ("channel", 8)
    assert (weights["int4"]["group_size"], weights["int4"]["num_bits"]) == (32, 4)
    for left in (about["fp8"]["modules_to_not_convert"], about["int8"]["ignore"], about["int4"]["ignore"]):
        assert f"{MOE}.gate" in left
        assert f"{MOE}.shared_experts.up_proj" in left
        assert "model.layers.2.mlp.experts.1.up_proj" in left
        assert not any(name.startswith(f"{MOE}.experts.") for name in left)


def refused(source: Path, out: Path, *words: str, to: str = "int8", **more: Any) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        quantise_checkpoint(source, out, to, **more)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert not out.exists() or out == source
    assert not list(out.parent.glob(".*.part"))


def test_what_cannot_be_quantised_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = checkpoint(tmp_path / "plain")
    refused(plain, plain, "exists: name another")
    refused(plain, out, "--to is 'int2'; it takes int8, int4, fp8", to="int2")
    refused(plain, out, "--group is 64; it takes 32 or 128", to="int4", group=64)
    refused(plain, out, "has rows of 160 weights; --to int4 takes multiples of 128", to="int4", group=128)
    quantise_checkpoint(plain, tmp_path / "done", "fp8")
    refused(tmp_path / "done", out, "is quantised already")
    refused(tmp_path, out, "has no config.json")

    def bad(value: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        weight = torch.ones(64, 160, dtype=dtype)
        weight[63, 2] = value
        return weight

    name = f"{EXPERT}.up_proj.weight"
    for number, value in enumerate(("nan", "inf")):
        source = checkpoint(tmp_path / f"bad{number}", **{name: bad(float(value))})
        refused(source, out, ".safetensors", name, f"[63, 2] is {value}; it takes finite weights")
    refused(checkpoint(tmp_path / "half", **{name: bad(1, torch.float16)}), out, name, "F16 [64, 160]", "in BF16")
    alone = tmp_path / "stacked"
    alone.mkdir()
    (alone / "config.json").write_text("{}")
    save_file({f"{MOE}.experts.gate_up_proj": torch.zeros(2, 4, 4)}, alone / "model.safetensors")
    refused(alone, out, "no routed experts", "gate_up_proj has all experts of a layer")
    for header in (b"[]", b'{"a": 1}', b'{"a": {"dtype": "BF16", "shape": [9], "data_offsets": [0, 18]}}'):
        (alone / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        refused(alone, out, "model.safetensors is no safetensors file")


def test_a_stop_and_a_full_disk_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = checkpoint(tmp_path / "plain"), tmp_path / "out"

    def stop(name: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise_checkpoint(source, out, "int8", say=stop)
    assert os.listdir(tmp_path) == ["plain"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            quantise_checkpoint(source, out, "int8")
    assert os.listdir(tmp_path) == ["plain"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    refused(source, out, "needs", "KiB", "has 1000 B free")


# ---- other readers


def tiny(folder: Path) -> Path:
    from ktverify.training.tiny import make_tiny, parse_sizes

    return make_tiny("qwen3_moe", folder, sizes=parse_sizes("hidden_size=128,moe_intermediate_size=64"))


def expected_of(source: Path, to: str) -> dict[str, Tensor]:
    """The parameters of the model whose routed experts are the codes' weights, by transformers' names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    found: dict[str, Tensor] = dict(model.state_dict())
    for name in [name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        matrices = [part for expert in found[name] for part in expert.chunk(2 if "gate_up" in name else 1)]
        made = [dequantised(to, GROUPS[to], *codes_of(each, to, GROUPS[to]), None) for each in matrices]
        found[name] = torch.stack(made).view(found[name].shape)
    return found


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_fp8(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny(tmp_path / "plain")
    quantise_checkpoint(source, tmp_path / "out", "fp8")
    try:
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        pytest.skip("transformers 5.6 reads FP8 with triton alone, which a CPU has not")
    expected = expected_of(source, "fp8")
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["int4", "int8"])
def test_transformers_reads_integers_with_compressed_tensors(to: str, tmp_path: Path) -> None:
    """transformers 5.23 keeps experts in the dtype of their scales, which is fp32 for int8."""
    pytest.importorskip("compressed_tensors", reason="the extra dev brings compressed-tensors from Python 3.11 on")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = tiny(tmp_path / "plain")
    quantise_checkpoint(source, tmp_path / "out", to)
    how = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=how)
    found, expected = model.to(torch.bfloat16).state_dict(), expected_of(source, to)
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
