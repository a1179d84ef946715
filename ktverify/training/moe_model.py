"""The sizes of a model with routed experts, from its config.json alone: the model's own code is built without weights.

So a family whose training is supported can be planned, and no formula of a family is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktverify.engines.argument_checks import LayerSpec, shown
from ktverify.errors import is_expected, one_line
from ktverify.system.text import read_json

# a model of more layers takes minutes to build, a plan of more experts gigabytes
MOST_LAYERS, MOST_EXPERTS = 1000, 1 << 16
# these make tables as long as a number in them says, and no causal language model needs them; auto_map names code
_LEFT_OUT = ("num_labels", "id2label", "label2id", "auto_map", "model_type", "quantization_config")


@dataclass(frozen=True)
class MoeModel:
    """family: model_type. layers: those with routed experts; all of them have E experts [I, H] and k experts a token.

    others: parameters outside of the routed experts. attention: (inputs, outputs) of each linear layer that LoRA adapts
    besides the experts. stored: the base format of the checkpoint."""

    family: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    others: int
    attention: tuple[tuple[int, int], ...]
    stored: str = "bf16"


def read_moe_model(path: Path) -> MoeModel:
    """The model of a config.json, or of the directory that has it. ValueError, in one line, for any other file, for a
    model without routed experts, and for experts that the engine cannot compute. No code of the checkpoint runs."""
    file = path / "config.json" if path.is_dir() else path
    given = read_json(file)
    if isinstance(given.get("text_config"), dict):  # a model of text and images
        given = given["text_config"]
    try:
        return _moe_model(given)
    except Exception as error:  # of transformers, for sizes that fit no model
        if isinstance(error, MemoryError) or not is_expected(error):
            raise
        raise ValueError(f"{file} cannot be planned: {one_line(error)[:500]}") from error


def _moe_model(given: dict[str, Any]) -> MoeModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ktverify.training.quantised import quantisation_of
    from ktverify.training.wrap import attention_layers, find_experts

    layers = given.get("num_hidden_layers", 1)
    if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {shown(layers)}; it takes 1 to {MOST_LAYERS}")
    family = _family(given)
    config = AutoConfig.for_model(family, **{name: value for name, value in given.items() if name not in _LEFT_OUT})
    with torch.device("meta"):
        form = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    blocks: list[Any] = find_experts(form)
    shapes = {tuple(block.down_proj.shape) for block in blocks}
    if len(shapes) > 1:
        raise ValueError(f"its layers have experts of different sizes, [E, H, I] {sorted(shapes)}; it takes one size")
    experts, hidden, intermediate = shapes.pop()
    if experts > MOST_EXPERTS:
        raise ValueError(f"its layers have {experts} experts; it takes at most {MOST_EXPERTS}")
    # the sizes that the engine takes
    sizes = {"hidden_size": hidden, "moe_intermediate_size": intermediate, "cpuinfer_threads": 1}
    LayerSpec(num_experts=experts, num_experts_per_tok=config.num_experts_per_tok, **sizes)
    routed = 3 * experts * hidden * intermediate * len(blocks)
    config.quantization_config = given.get("quantization_config")
    about = quantisation_of(config)
    return MoeModel(
        family=family,
        layers=len(blocks),
        experts=experts,
        top_k=config.num_experts_per_tok,
        hidden=hidden,
        intermediate=intermediate,
        others=sum(parameter.numel() for parameter in form.parameters()) - routed,
        attention=tuple((layer.in_features, layer.out_features) for layer in attention_layers(form).values()),
        stored=about.format.lower() if about else "bf16",
    )


def _family(given: dict[str, Any]) -> str:
    """model_type, or that of the architecture: Kimi-K2 has a model_type of its own and DeepSeek-V3's architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES

    family, named = given.get("model_type"), given.get("architectures")
    if isinstance(family, str) and family in ARCHITECTURES:
        return family
    known: list[str] = [
        each for each, architecture in ARCHITECTURES.items() if isinstance(named, list) and architecture in named
    ]
    if not known:
        raise ValueError(
            f"model_type is {shown(family)} and architectures {shown(named)}; it takes a causal language model that "
            "transformers has"
        )
    return known[0]
