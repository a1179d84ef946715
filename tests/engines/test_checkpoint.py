"""Base weights from safetensors files: the same bits as from tensors, and only what is needed in memory."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from ktverify.checks.target import expect, expect_same_bits
from ktverify.engines.checkpoint_files import INDEX
from ktverify.engines.native.checkpoint import FAMILIES
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, layer_arguments, run_layer
from ktverify.isolation.child import ChildPool
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

CASE = Case.parse("E=5,k=2,H=97,I=46,T=9,r=3,alpha=6")
MEMORY = "E=16,k=2,H=2048,I=1024,T=64,r=1,alpha=2"


def write(directory: Path, case: Case, *, family: str, files: int = 1, layer: int = 0) -> Path:
    """The base weights of `case` as layer `layer` in `family`'s names; one file, or several and an index."""
    inputs = make_inputs(case)
    tensors = {
        f"model.{pattern.format(layer=layer, expert=expert)}.weight": getattr(inputs, name)[expert].contiguous()
        for name, pattern in FAMILIES[family].items()
        for expert in range(case.num_experts)
    }
    # the next layer, and a shared expert: neither is to be taken for a routed expert of this one
    tensors[f"model.layers.{layer}0.mlp.experts.0.gate_proj.weight"] = torch.zeros(1, 1)
    tensors[f"model.layers.{layer}.mlp.shared_experts.gate_proj.weight"] = torch.zeros(1, 1)
    if files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory / "model.safetensors"
    names, listed = sorted(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number::files]
        save_file({name: tensors[name] for name in part}, directory / file)
        listed.update(dict.fromkeys(part, file))
    (directory / INDEX).write_text(json.dumps({"weight_map": listed}))
    return directory


def loaded(path: Path, case: Case, *, layer: int = 0) -> KTMoEWrapper:
    """A layer with the checkpoint's base weights and the case's LoRA."""
    made = KTMoEWrapper(**layer_arguments(case, threads=2, layer_idx=layer, weight_path=str(path)))
    made.load_weights()
    inputs = make_inputs(case)
    made.init_lora_weights(*(inputs.lora[name] for name in LORA_NAMES))
    return made


def check_memory(directory: str, text: str) -> None:
    """AssertionError unless a mapped checkpoint costs two experts for a token that reaches two, and at most 1.05 times
    the weights when all are packed."""
    case = Case.parse(text)
    path = write(Path(directory), case, family=next(iter(FAMILIES)))
    inputs = make_inputs(case)
    lora = [inputs.lora[name] for name in LORA_NAMES]
    x, ids, weights = inputs.hidden_states, inputs.expert_ids, inputs.weights
    del inputs
    one = sum(2 * case.hidden * case.intermediate for _ in BASE_NAMES)
    layer = KTMoEWrapper(**layer_arguments(case, threads=2, weight_path=str(path)))
    layer.init_lora_weights(*lora)
    process = psutil.Process()
    before = process.memory_info().rss
    layer.load_weights()
    layer.forward_sft(x[:1], ids[:1], weights[:1], save_for_backward=False)
    layer.clear_sft_buffer_cache()
    reached = len(set(ids[0].tolist()))
    grown = process.memory_info().rss - before
    # an expert's pages of the file, its packed copy, and huge pages that are not full
    expect(
        reached * one < grown < (reached + 2) * one + (4 << 20),
        f"{grown / one:.1f} experts' memory for {reached} reached",
    )
    layer.forward_sft(x, ids, weights, save_for_backward=False)
    layer.clear_sft_buffer_cache()
    expect(layer.packed_experts == case.num_experts, f"the tokens reach {layer.packed_experts} experts only")
    grown = process.memory_info().rss - before
    whole = case.num_experts * one
    expect(grown <= 1.05 * whole, f"{grown / whole:.2f} times the weights")


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_from_tensors(tmp_path: Path, family: str, files: int) -> None:
    path = write(tmp_path, CASE, family=family, files=files, layer=3)
    inputs = make_inputs(CASE)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, inputs), inputs)
    expect_same_bits("tensors and checkpoint", expected, run_layer(loaded(path, CASE, layer=3), inputs))
    # a folder needs no index
    (tmp_path / INDEX).unlink(missing_ok=True)
    expect_same_bits("tensors and folder", expected, run_layer(loaded(tmp_path, CASE, layer=3), inputs))


def test_physical_map_is_of_the_files_experts(tmp_path: Path) -> None:
    path = write(tmp_path, CASE, family="Mixtral")
    inputs = make_inputs(CASE)
    slots = torch.tensor([3, 0, 4, 1, 2])
    layer = loaded(path, CASE)
    layer.load_weights(slots)
    other = build_layer(KTMoEWrapper, CASE, inputs)
    other.load_weights_from_tensors(inputs.gate_proj, inputs.up_proj, inputs.down_proj, slots)
    expect_same_bits("tensors and checkpoint", run_layer(other, inputs), run_layer(layer, inputs))


def test_memory(tmp_path: Path) -> None:
    ChildPool().call_fresh(check_memory, directory=str(tmp_path), text=MEMORY)


def _refused(path: Path | str, layer: int = 0, case: Case = CASE) -> str:
    made = KTMoEWrapper(**layer_arguments(case, threads=2, layer_idx=layer, weight_path=str(path)))
    with pytest.raises((ValueError, TypeError)) as refusal:
        made.load_weights()
    return str(refusal.value)


def test_refusals_say_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, CASE, family="Mixtral")
    assert "''" in _refused("")
    assert "nowhere" in _refused(tmp_path / "nowhere")
    assert "layer 7" in _refused(path, layer=7)
    assert "num_experts (4)" in _refused(path, case=Case.parse("E=4,k=2,H=97,I=46,T=9,r=3,alpha=6"))
    assert "experts.5.w1" in _refused(path, case=Case.parse("E=6,k=2,H=97,I=46,T=9,r=3,alpha=6"))
    assert "[46, 97]" in _refused(path, case=Case.parse("E=5,k=2,H=96,I=46,T=9,r=3,alpha=6"))
    tensors = load_file(path)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path)
    assert "F32" in _refused(path)
    path.write_bytes(b"nothing of the kind")
    assert "no safetensors file" in _refused(path)
    path.unlink()
    assert "no *.safetensors" in _refused(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_becomes_shorter_is_an_error(packed: bool, tmp_path: Path) -> None:
    path = write(tmp_path, CASE, family="Mixtral")
    whole = path.read_bytes()
    layer, inputs = loaded(path, CASE), make_inputs(CASE)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, inputs), inputs)
    if packed:
        layer.forward_sft(inputs.hidden_states[:1], inputs.expert_ids[:1] * 0, inputs.weights[:1], False)
    for size in (len(whole) - 1, len(whole) // 2, 0):
        os.truncate(path, size)
        with pytest.raises(
            OSError, match=rf"model.safetensors has {size} bytes, and had {len(whole)} when it was loaded"
        ):
            run_layer(layer, inputs)
    with path.open("r+b") as file:
        file.write(whole)
    expect_same_bits("written again", run_layer(layer, inputs), expected)


def test_a_file_that_was_replaced_is_still_the_mapped_one(tmp_path: Path) -> None:
    path = write(tmp_path, CASE, family="Mixtral")
    layer, inputs = loaded(path, CASE), make_inputs(CASE)
    path.unlink()
    path.write_bytes(b"another file")
    again = run_layer(layer, inputs)
    expect_same_bits("replaced", again, run_layer(build_layer(KTMoEWrapper, CASE, inputs), inputs))


# ---- several towers, and files that disagree


def tensors_of(prefix: str, *, layer: int = 0, seed: int = 0, family: str = next(iter(FAMILIES))) -> dict[str, Any]:
    """The base weights of CASE with that seed as a layer of the tower `prefix`."""
    inputs = make_inputs(replace(CASE, seed=seed))
    return {
        f"{prefix}{pattern.format(layer=layer, expert=expert)}.weight": getattr(inputs, name)[expert].contiguous()
        for name, pattern in FAMILIES[family].items()
        for expert in range(CASE.num_experts)
    }


def save(folder: Path, *files: dict[str, Any], index: bool = False) -> Path:
    """The files in a folder, with an index of them or without."""
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"{number}.safetensors")
    if index:
        named = {name: f"{number}.safetensors" for number, tensors in enumerate(files) for name in tensors}
        (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    return folder


OTHERS = ["mtp.", "model.mtp.", "vision_tower.", "model.visual.", "audio_tower.", "talker.model.", "encoder."]


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("decoder", ["", "model.", "model.language_model.", "thinker.model."])
def test_the_decoders_experts_are_taken(decoder: str, index: bool, tmp_path: Path) -> None:
    right = tensors_of(decoder, layer=3)
    others = {}
    for number, prefix in enumerate(OTHERS, start=1):
        others.update(tensors_of(prefix, layer=3, seed=number))
    layer = loaded(save(tmp_path, right, others, index=index), CASE, layer=3)
    inputs = make_inputs(CASE)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, inputs), inputs)
    expect_same_bits("tensors and the decoder's", expected, run_layer(layer, inputs))


@pytest.mark.parametrize(
    ("one", "other"),
    [("model.", "student.model."), ("model.", ""), ("model.language_model.", "model.backbone.")],
)
def test_two_decoders_are_refused_with_both_names(one: str, other: str, tmp_path: Path) -> None:
    # the second tower has another layer: at the one asked for there would be no doubt, and yet it may be the wrong one
    text = _refused(save(tmp_path, tensors_of(one), tensors_of(other, layer=1)))
    first = "mlp.experts.0.gate_proj.weight"
    assert f"either may be the decoder's: {one}layers.0.{first}, {other}layers.1.{first}" in text


@pytest.mark.parametrize("prefix", OTHERS)
def test_another_towers_experts_alone_are_refused(prefix: str, tmp_path: Path) -> None:
    # the decoder's first layer is dense
    text = _refused(save(tmp_path, {**tensors_of(prefix), **tensors_of("model.", layer=1)}))
    assert f"; {prefix}layers.0.mlp.experts.0.gate_proj.weight is not the decoder's" in text


@pytest.mark.parametrize("part", ["eh_proj.weight", "shared_head.norm.weight", "enorm.weight"])
def test_a_layer_that_predicts_further_tokens_is_none_of_the_decoders(part: str, tmp_path: Path) -> None:
    further = {**tensors_of("model.", layer=1, seed=1), f"model.layers.1.{part}": torch.zeros(1)}
    path = save(tmp_path, {**tensors_of("model."), **further})
    assert f"layer 1 predicts further tokens (model.layers.1.{part})" in _refused(path, layer=1)
    loaded(path, CASE)


def test_a_tensor_in_two_files_needs_an_index(tmp_path: Path) -> None:
    files = [tensors_of("model."), tensors_of("model.", seed=1)]
    assert "in 0.safetensors and 1.safetensors, and no model.safetensors.index.json" in _refused(save(tmp_path, *files))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(files[0], "0.safetensors")}))
    inputs = make_inputs(CASE)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, inputs), inputs)
    expect_same_bits("tensors and the index's", expected, run_layer(loaded(tmp_path, CASE), inputs))


NAME = "model.layers.0.mlp.experts.0.gate_proj.weight"


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        ("{}", f"{INDEX} has no weight_map"),
        ("[]", f"{INDEX} holds a list; it takes a dict"),
        ('{"weight_map": [1]}', "has no weight_map"),
        ('{"weight_map": ', f"{INDEX}, line 1 is no JSON"),
        (json.dumps({"weight_map": {NAME: "../a.safetensors"}}), "it takes the name of a file beside it"),
        (json.dumps({"weight_map": {NAME: 3}}), f"the file of {NAME} is 3"),
        (json.dumps({"weight_map": {NAME: "no.safetensors"}}), f"{NAME} is in no.safetensors, which is not in"),
        (json.dumps({"weight_map": {NAME: "1.safetensors"}}), f"says that {NAME} is in 1.safetensors, which does not"),
        (json.dumps({"weight_map": {NAME: "0.safetensors"}}), "has no model.layers.0.mlp.experts.0.up_proj.weight"),
    ],
)
def test_an_index_that_is_broken_or_disagrees_with_its_files_is_named(index: str, wanted: str, tmp_path: Path) -> None:
    save(tmp_path, tensors_of("model."), {"other": torch.zeros(1)})
    (tmp_path / INDEX).write_text(index)
    assert wanted in _refused(tmp_path)
