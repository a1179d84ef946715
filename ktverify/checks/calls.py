"""The constructor's and the calls' arguments, as the table "Calls" of docs/contract.md has them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ktverify.checks.altered_inputs import changed, rows_of, with_case
from ktverify.checks.causes import Cause
from ktverify.checks.check import Where, check
from ktverify.checks.target import MIDDLE, SMALL, Target, expect
from ktverify.engines.run import backward_of, run_layer
from ktverify.isolation import hosted
from ktverify.judge import gates
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES, OUTPUT

# h of a call is 34 MB in bf16, the weights are 0.8 MB
WORKING = Case.parse("E=2,k=2,H=64,I=1024,T=8192,r=4,alpha=8")
LARGEST = 1 << 24


@check("behaviour", "chunked_prefill_size is the largest T")
def check_largest_call(target: Target) -> None:
    """A call of exactly chunked_prefill_size tokens has the bits of one below a larger limit; so has a limit of 1."""
    inputs = make_inputs(MIDDLE)
    for rows in (MIDDLE.qlen, 1):
        few = rows_of(inputs, slice(rows))
        expected = target.run(MIDDLE, few)
        found = run_layer(target.layer(MIDDLE, few, chunked_prefill_size=rows), few)
        target.expect_same_bits(f"{rows} tokens with chunked_prefill_size {rows}", expected, found)


@check("behaviour", "layer_idx names the layer and changes no result; two layers may have the same.")
def check_layer_index(target: Target) -> None:
    """Layers with another layer_idx, and two different ones with the same, have the bits of layer 0."""
    inputs, other = make_inputs(MIDDLE), make_inputs(MIDDLE.with_seed(5))
    expected = [target.run(MIDDLE, each) for each in (inputs, other)]
    for index in (1, 61):
        layers = [target.layer(MIDDLE, each, layer_idx=index) for each in (inputs, other)]
        for number, each in enumerate((inputs, other)):
            found = run_layer(layers[number], each)
            target.expect_same_bits(f"layer {number + 1} of two with layer_idx {index}", expected[number], found)


@check("behaviour", "forward_sft(hidden_states, expert_ids, weights, save_for_backward=True)", cause=Cause.ORDER)
def check_saved_by_default(target: Target) -> None:
    """A forward without the argument save_for_backward has a backward."""
    inputs = make_inputs(MIDDLE)
    layer = target.layer(MIDDLE, inputs)
    output = layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights)
    found = {OUTPUT: output, **backward_of(layer, inputs)}
    target.expect_same_bits("without the argument save_for_backward", target.run(MIDDLE, inputs), found)


@check("behaviour", "A second call replaces the first", cause=Cause.STALE_VALUES)
def check_reload(target: Target) -> None:
    """Other base weights, loaded into a used layer, leave nothing of the old ones, and the LoRA as it was."""
    inputs, other = make_inputs(MIDDLE), make_inputs(MIDDLE.with_seed(4))
    layer = target.layer(MIDDLE, inputs)
    run_layer(layer, inputs)
    layer.load_weights_from_tensors(*(getattr(other, name) for name in (*BASE_NAMES, "physical_map")))
    mixed = changed(other, **inputs.lora)
    target.expect_same_bits("a used layer with new weights", target.run(MIDDLE, mixed), run_layer(layer, mixed))


@check("behaviour", "A second call replaces them", cause=Cause.STALE_LORA)
def check_lora_again(target: Target) -> None:
    """Other LoRA tensors, given to a used layer, replace the first as parameters and as values."""
    inputs, other = make_inputs(MIDDLE), make_inputs(MIDDLE.with_seed(4))
    layer = target.layer(MIDDLE, inputs)
    run_layer(layer, inputs)
    layer.init_lora_weights(*(other.lora[name].clone() for name in LORA_NAMES))
    mixed = changed(inputs, **other.lora)
    expected = target.run(MIDDLE, mixed)
    target.expect_same_bits("a used layer with new LoRA", expected, run_layer(layer, mixed))
    layer.update_lora_weights()
    target.expect_same_bits("after update_lora_weights", expected, run_layer(layer, mixed))


@check("processes", "gives memory back", gates=("resources",), where=Where.OWN_CHOICE, fresh_process=True)
def check_cleared_memory_comes_back(target: Target) -> None:
    """After a large call, clear_sft_buffer_cache returns what the call took beyond the packed weights."""
    inputs = make_inputs(WORKING)
    layer = target.layer(WORKING, inputs)

    def resident() -> int:
        layer.clear_sft_buffer_cache()
        return hosted.resident()

    # every size of result and every expert once, so that only buffers are new afterwards
    run_layer(layer, rows_of(inputs, slice(1)))
    before = resident()
    run_layer(layer, inputs)
    kept = resident() - before
    budget = gates.tolerances()["memory"]["cleared"] * WORKING.qlen * WORKING.top_k * WORKING.intermediate
    text = f"{kept / 1e6:.0f} MB stay after clear_sft_buffer_cache, at most {budget / 1e6:.0f} MB may"
    target.expect(kept <= budget, text, "resources", max(0.0, kept / budget))


# ---- the native engine alone

MAKES_CODES = ("AMXINT8_SFT", "AMXINT4_SFT", "AMXFP8_SFT")


@check(
    "native",
    "weight_path= is a safetensors file or folder of weights in the method's format, or in bf16, of which it makes "
    "codes; load_weights() then takes the experts of layer layer_idx from it, with the bits of "
    "load_weights_from_tensors.",
    native=True,
    internal=True,
)
def check_weight_path(target: Target) -> None:
    """load_weights takes the experts of layer layer_idx, and their bits are those of load_weights_from_tensors; with
    methods that make codes of bf16 weights too."""
    every = [make_inputs(SMALL.with_seed(seed)) for seed in (0, 8)]
    with tempfile.TemporaryDirectory() as folder:
        tensors = {
            f"model.layers.{index}.mlp.experts.{expert}.{name}.weight": getattr(inputs, name)[expert].contiguous()
            for index, inputs in enumerate(every)
            for name in BASE_NAMES
            for expert in range(SMALL.num_experts)
        }
        file = Path(folder) / "model.safetensors"
        save_file(tensors, file)
        for index, inputs in enumerate(every):
            for path in (file, file.parent):
                layer = target.bare(SMALL, weight_path=str(path), layer_idx=index)
                layer.load_weights()
                layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
                what = f"layer {index} of {path.name or 'a folder'}"
                target.expect_same_bits(what, target.run(SMALL, inputs), run_layer(layer, inputs))
        for method in MAKES_CODES:
            made = replace(target, method=method)
            layer = made.bare(SMALL, weight_path=str(file), layer_idx=1)
            layer.load_weights()
            layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
            target.expect_same_bits(f"method {method}", made.run(SMALL, inputs), run_layer(layer, inputs))


@check(
    "native",
    "load_weights(first=, total=) takes the experts from first on of a checkpoint that has total; one that has more is "
    "refused.",
    native=True,
    internal=True,
)
def check_part_of_weight_path(target: Target) -> None:
    """Three of six experts from a file: the bits of those three from tensors. ValueError for a total of four."""
    inputs, first = make_inputs(SMALL), 2
    own = slice(first, first + 3)
    part = {name: getattr(inputs, name)[own].contiguous() for name in BASE_NAMES}
    lora = {name: inputs.lora[name][own].contiguous() for name in LORA_NAMES}
    ids, identity = inputs.expert_ids % 3, torch.arange(3)
    three = with_case(changed(inputs, **part, **lora, expert_ids=ids, physical_map=identity), num_experts=3)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": getattr(inputs, name)[expert].contiguous()
            for name in BASE_NAMES
            for expert in range(SMALL.num_experts)
        }
        file = Path(folder) / "model.safetensors"
        save_file(tensors, file)
        layer = target.bare(three.case, weight_path=str(file))
        layer.load_weights(first=first, total=SMALL.num_experts)
        layer.init_lora_weights(*(lora[name].clone() for name in LORA_NAMES))
        target.expect_same_bits("experts 2 to 4 of a file", target.run(three.case, three), run_layer(layer, three))
        try:
            target.bare(three.case, weight_path=str(file)).load_weights(first=0, total=4)
        except ValueError as error:
            expect("more experts than num_experts (4)" in str(error), f"the error says {error}")
        else:
            expect(False, "a file of more experts than total was accepted")


@check("native", "Sizes up to 2^24.", gates=(), native=True, internal=True)
def check_largest_sizes(target: Target) -> None:
    """A layer of 2^24 is made, and 2^24 + 1 is a ValueError that names the argument."""
    for name in ("hidden_size", "moe_intermediate_size", "num_experts", "lora_rank", "chunked_prefill_size"):
        target.bare(SMALL, **{name: LARGEST})
        try:
            target.bare(SMALL, **{name: LARGEST + 1})
        except ValueError as error:
            expect(name in str(error) and str(LARGEST) in str(error), f"{name} 2^24 + 1: the error says {error}")
        else:
            expect(False, f"{name} of 2^24 + 1 was accepted")
