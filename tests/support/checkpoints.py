"""Checkpoints written for a test, and what loading them takes. Runs in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from ktverify.checks.target import expect
from ktverify.engines.native.checkpoint import FAMILIES, INDEX
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import layer_arguments
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES


def write(directory: Path, case: Case, *, family: str, files: int = 1, layer: int = 0) -> Path:
    """The base weights of `case` as layer `layer` in `family`'s names; one file, or several and an index."""
    inputs = make_inputs(case)
    tensors = {
        f"model.{pattern.format(layer=layer, expert=expert)}": getattr(inputs, name)[expert].contiguous()
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
