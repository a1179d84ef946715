"""wrap_moe_layers: the engine under every block of routed experts of a Hugging Face model.

The model must use transformers' experts interface, which is then set to the engine. Only the tensors of the routed
experts leave the model: router, scaling, grouping, normalisation and shared experts stay as they are.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from ktverify.engines.expert_parallel import Share
from ktverify.training.infer import CpuInfer, init_cpu_infer
from ktverify.training.layer import MOELayerWrapper, uncompiled

IMPLEMENTATION, IMPLEMENTATION_OF_RANKS = "ktverify", "ktverify_ep"
# in which torchrun, accelerate and MPI tell a process how many there are
PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
WEIGHTS = ("gate_up_proj", "down_proj")
# families whose parity with the stock model is tested; others are accepted if their experts have the same form
FAMILIES = ("deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "olmoe")


def wrap_moe_layers(
    model: nn.Module, infer: CpuInfer | None = None, *, auto_update: bool = True, expert_parallel: Any = None
) -> nn.Module:
    """Let the engine compute the routed experts of `model`, and return it; `model._kt_wrappers` lists one per layer.

    The engine gets the base weights gate_up_proj [E, 2 I, H] and down_proj [E, H, I] as bf16, and the model keeps no
    copy; of a model that was loaded without them it reads the files. Attach LoRA afterwards, with `add_adapter` or
    `load_adapter`. auto_update: see MOELayerWrapper.
    expert_parallel: a group of torch.distributed, like dist.group.WORLD, whose ranks divide the experts; each keeps its
    own. All ranks call the model, and save the adapter, together.
    ValueError, before anything is changed, for a model that is not supported, for one of several processes without
    expert_parallel, for more ranks than experts, and for files that are not as the method takes them.
    """
    if expert_parallel is None:
        require_one_process()
    chosen = infer or init_cpu_infer()
    if getattr(model, "_kt_wrappers", None):
        raise ValueError("this model is wrapped already: wrap_moe_layers takes a freshly loaded one")
    blocks = find_experts(model)
    if any(getattr(block, name).is_meta for block in blocks for name in WEIGHTS):
        raise ValueError("the experts' weights are on the device meta: load them first")
    at: str | None = getattr(model, "_kt_experts_at", None)  # set by pretrained.load_by_files
    if at is None and chosen.experts_in_files(True):
        raise ValueError(
            "the model has its experts' weights in memory, and the engine is to read codes: load it with "
            "ktverify.training.load_model(path, infer=…), which leaves them in the files"
        )
    if expert_parallel is not None and (chosen.gpu.number or chosen.gpu.layers):
        raise ValueError("expert_parallel divides the experts of engines, and some are to be on a GPU: take one")
    shares = [_share(expert_parallel, block) for block in blocks]
    names = {module: name for name, module in model.named_modules()}
    chosen.gpu.check([int(block.down_proj.shape[0]) for block in blocks])  # type: ignore[index]
    wrappers = []
    for number, (block, share) in enumerate(zip(blocks, shares, strict=True)):
        weights = [getattr(block, name).detach() for name in WEIGHTS]
        if share is not None:
            weights = [weight[share.experts.start : share.experts.stop] for weight in weights]
        files = (at, number_of(names[block])) if at else None
        if not files:
            # copied where they are a part, so that nothing keeps the other ranks' experts in memory
            weights = [weight.to("cpu", torch.bfloat16, copy=share is not None) for weight in weights]
        wrapper = MOELayerWrapper(number, weights[0], weights[1], chosen, files, share)
        wrapper.auto_update = auto_update
        wrappers.append(wrapper)
    around = {id(child): module for module in model.modules() for child in module.children()}
    for block, wrapper in zip(blocks, wrappers, strict=True):
        wrapper.block = (around[id(block)],)
        # not by the model's method, which takes only transformers' own names in some releases
        used = IMPLEMENTATION if wrapper.share is None else IMPLEMENTATION_OF_RANKS
        block.config._experts_implementation = used  # type: ignore[union-attr]
        _hand_over(block, wrapper)
    model._kt_wrappers = wrappers  # type: ignore[assignment]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _no_whole_checkpoint  # type: ignore[assignment]
    return model


def _share(group: Any, block: Any) -> Share | None:
    return None if group is None else Share(group, len(block.down_proj))


def _no_whole_checkpoint(*given: object, **named: object) -> None:
    raise RuntimeError(
        "the engine has the experts' weights, so this checkpoint would lack them: save the adapter, then python -m "
        "ktverify export-merged"
    )


def number_of(block: str) -> int:
    """The number of the layer in the name of a block of experts. ValueError where there is none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", block)
    if not found:
        raise ValueError(f"the experts {block!r} are in no numbered layer, by which a checkpoint's files have them")
    return int(found[1])


def update_lora_pointers(model: nn.Module) -> None:
    """Give the present LoRA values to every engine of a wrapped model. Only needed where auto_update is off.

    ValueError where wrap_moe_layers was not called."""
    wrappers: list[MOELayerWrapper] | None = getattr(model, "_kt_wrappers", None)
    if not wrappers:
        raise ValueError("this model has no engine: call wrap_moe_layers(model) first")
    for wrapper in wrappers:
        wrapper.update_lora_pointers()


def require_one_process() -> None:
    """ValueError where this process is one of several of one training: DistributedDataParallel and the like would copy
    the placeholders of the experts' weights."""
    if (count := process_count()) > 1:
        raise ValueError(
            f"this is one of {count} processes, a training takes one: start it without torchrun, accelerate launch or "
            "mpirun, because the engine uses all processors by threads (kt_num_threads); python -m ktverify train with "
            "kt_ep: true divides the experts among the processes of torchrun"
        )


def process_count() -> int:
    """Of how many processes of one training this is one."""
    counts = [_count_of(name) for name in PROCESS_COUNTS]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts.append(torch.distributed.get_world_size())
    return max(counts)


def _count_of(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 1


def find_experts(model: nn.Module) -> list[nn.Module]:
    """The blocks of routed experts, in the model's order. ValueError for none, or for a form that is not supported."""
    # transformers' experts interface gives its blocks both; newer releases of it give them more
    blocks = [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "_apply_gate")]
    reasons = [reason for block in blocks if (reason := _why_not(block))]
    if not blocks:
        reasons = ["it has no routed experts behind transformers' experts interface"]
    if reasons:
        config = getattr(model, "config", None)
        name = (getattr(config, "architectures", None) or [type(model).__name__])[0]
        raise ValueError(
            f"Model architecture {name} not supported for KTransformers: {reasons[0]}; supported: "
            f"{', '.join(FAMILIES)}, and other families whose experts are silu(gate) * up, stacked, without biases"
        )
    return blocks


def attention_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the attention, by name. Of a model with an adapter also the adapter's own."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linear.items() if "attn" in name}


def _why_not(block: Any) -> str:
    """Why the engine cannot compute these experts; "" when it can."""
    kind = type(block).__name__
    for flag, wanted in (
        ("has_gate", True),
        ("has_bias", False),
        ("is_transposed", False),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
        ("_is_expert_parallel", False),
    ):
        if getattr(block, flag, wanted) != wanted:
            return f"{kind}.{flag} is {not wanted}"
    if type(block)._apply_gate is not _default_apply_gate:
        return f"{kind} has a gate function of its own"
    activation = getattr(block, "act_fn", None)
    if not _is_silu(activation):
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"{kind} has the activation {name}, not SiLU"
    for name in WEIGHTS:
        weight = getattr(block, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            return f"{kind} has no stacked {name}"
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"{kind}.{name} is {weight.dtype}"
    return ""


def _is_silu(activation: Any) -> bool:
    """Whether `activation` computes x sigmoid(x), by its values: families name it in many ways, F.silu among them."""
    if not callable(activation):
        return False
    # sizes from 0.0001 to 10,000, so that a clamped one is another function too
    sizes = torch.logspace(-4, 4, 161, device="cpu")
    x = torch.cat([-sizes, sizes.new_zeros(1), sizes])
    try:
        with torch.no_grad():
            found = activation(x.clone())  # it may compute in place
            return torch.allclose(found, functional.silu(x), rtol=1e-5, atol=1e-6)
    except Exception:  # a function of other arguments, or with results of another form
        return False


def _hand_over(block: nn.Module, wrapper: MOELayerWrapper) -> None:
    """Replace the block's parameters by placeholders of one element, of which peft reads shape, dtype and device."""
    block._kt_layer = (wrapper,)  # type: ignore[assignment]  # in a tuple: no submodule, no further names
    for name in WEIGHTS:
        old = getattr(block, name)
        empty = torch.zeros(1, dtype=old.dtype).expand(old.shape)
        setattr(block, name, nn.Parameter(empty, requires_grad=False))
    # a moved or cast placeholder would become a whole tensor, and a saved one would be zeros
    changed: Any = block
    changed._apply = partial(_stay, block)
    changed._load_from_state_dict = partial(_load_others, block)
    changed.register_state_dict_post_hook(_leave_out)


def _stay(block: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    return block


def _load_others(block: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
    """Load what is not in the engine; `more` is (metadata, strict, missing, unexpected, errors), as torch gives it."""
    *_, missing, _unexpected, errors = more
    names = [prefix + name for name in WEIGHTS]
    given = [name for name in names if name in state]
    if given:
        errors.append(f"{given[0]} is in the state, but the engine has these weights: load them before wrap_moe_layers")
    rest = {name: tensor for name, tensor in state.items() if name not in given}
    type(block)._load_from_state_dict(block, rest, prefix, *more)
    missing[:] = [name for name in missing if name not in names]


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in WEIGHTS:
        state.pop(prefix + name, None)


@uncompiled
def _experts_forward(
    block: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Called by the experts interface: hidden_states [T, H], top_k_index, top_k_weights [T, k] -> [T, H]."""
    if not hasattr(block, "_kt_layer"):
        raise RuntimeError(f"{type(block).__name__} has no engine: call wrap_moe_layers(model) first")
    if hasattr(block, "parametrizations"):
        raise RuntimeError(
            "the adapter of these experts was attached by peft alone, which needs base weights that the engine holds: "
            "attach it with ktverify.training.add_adapter or load_adapter"
        )
    layer: MOELayerWrapper = block._kt_layer[0]  # type: ignore[assignment,index]
    output: torch.Tensor = (
        layer(hidden_states, top_k_index, top_k_weights)
        if layer.share is None
        else layer.share.forward(layer, hidden_states, top_k_index, top_k_weights)
    )
    return output


# on import, because a model that was saved whole is loaded without wrap_moe_layers
for _name in (IMPLEMENTATION, IMPLEMENTATION_OF_RANKS):
    ALL_EXPERTS_FUNCTIONS.register(_name, _experts_forward)
