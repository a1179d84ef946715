"""One case through one engine: build the layer, load it, forward, backward.

Input: an engine factory and a case. Output: a dict of ALL_TENSORS. Keeps nothing between calls.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ktverify.engines.registry import EngineFactory
from ktverify.isolation.calls import CONSTRUCTOR, ENGINE_EXCEPTIONS, call_of
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT
from ktverify.system.limits import processors

METHOD = "AMXBF16_SFT"


def layer_arguments(
    case: Case, *, isa: str | None = None, tp: int = 1, threads: int | None = None, **more: Any
) -> dict[str, Any]:
    """KTMoEWrapper's keyword arguments for `case`; `more` overrides them. isa is passed on only if it is not None.

    tp: tensor parallel degree. threads: most workers; None for all processors that this process may run on.
    """
    arguments: dict[str, Any] = {
        "layer_idx": 0,
        "num_experts": case.num_experts,
        "num_experts_per_tok": case.top_k,
        "hidden_size": case.hidden,
        "moe_intermediate_size": case.intermediate,
        "num_gpu_experts": 0,
        "cpuinfer_threads": threads or processors(),
        "threadpool_count": tp,
        "weight_path": "",
        "chunked_prefill_size": max(512, case.qlen),
        "method": METHOD,
        "mode": "sft",
        "lora_rank": case.rank,
        "lora_alpha": case.alpha,
    }
    if isa is not None:
        arguments["isa"] = isa
    return {**arguments, **more}


def build_layer(factory: EngineFactory, case: Case, inputs: Inputs, **settings: Any) -> Any:
    """A layer of `factory` with the case's base weights and copies of its LoRA; settings: as layer_arguments."""
    with call_of(CONSTRUCTOR):
        layer = factory(**layer_arguments(case, **settings))
    with call_of("load_weights_from_tensors"):
        layer.load_weights_from_tensors(
            inputs.slotted("gate_proj"), inputs.slotted("up_proj"), inputs.slotted("down_proj"), inputs.physical_map
        )
    with call_of("init_lora_weights"):
        layer.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
    return layer


def forward(layer: Any, inputs: Inputs, *, save: bool) -> torch.Tensor:
    """The output [T, H] as the engine returned it. TypeError where it is no tensor."""
    with call_of("forward_sft"):
        output = layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=save)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"the result is a {type(output).__name__}, it must be a tensor [T, H]")
    return output


def run_layer(
    layer: Any, inputs: Inputs, *, backward: bool = True, into: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """ALL_TENSORS of one forward and one backward of a loaded layer; only output without backward.

    The tensors are those that the engine returned; a missing gradient raises KeyError, an additional one ValueError.
    into: an empty dict that gets each tensor when it is there, so that it has the output where the backward raises.
    """
    result = {} if into is None else into
    result[OUTPUT] = forward(layer, inputs, save=backward)
    if not backward:
        return result
    result.update(backward_of(layer, inputs))
    return {name: result[name] for name in ALL_TENSORS}


def backward_of(layer: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The gradients of the newest saved forward, by name. KeyError or ValueError unless the LoRA ones are the six."""
    with call_of("backward"):
        grad_input, grad_loras = layer.backward(inputs.grad_output)
        check_grad_names(grad_loras)
        found = {GRAD_INPUT: grad_input, **grad_loras, GRAD_WEIGHTS: layer.grad_weights}
        for name, tensor in found.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}, it must be a tensor")
        return found


def check_grad_names(grad_loras: Mapping[str, torch.Tensor]) -> None:
    """KeyError or ValueError unless the keys are the six of the contract."""
    missing = [name for name in GRAD_NAMES if name not in grad_loras]
    if missing:
        raise KeyError(f"backward gave no {', '.join(missing)}")
    further = [name for name in grad_loras if name not in GRAD_NAMES]
    if further:
        raise ValueError(f"backward gave {', '.join(further)}, it takes exactly {', '.join(GRAD_NAMES)}")


def run_case(
    factory: EngineFactory,
    case: Case,
    *,
    inputs: Inputs | None = None,
    backward: bool = True,
    into: dict[str, torch.Tensor] | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """ALL_TENSORS of `case` as the engine computes them; only output without backward.

    inputs: those of the case, if the caller has them. into: as run_layer takes it. settings: as layer_arguments.
    Exceptions of the engine are not caught.
    """
    given = make_inputs(case) if inputs is None else inputs
    with _collect_what_is_new():
        layer = build_layer(factory, case, given, **settings)
        unless_first: contextlib.AbstractContextManager[None] = contextlib.suppress(*ENGINE_EXCEPTIONS)
        try:
            found = run_layer(layer, given, backward=backward, into=into)
            unless_first = contextlib.nullcontext()
            return {name: tensor.detach() for name, tensor in found.items()}
        finally:
            # of two exceptions the first is raised
            with unless_first, call_of("clear_sft_buffer_cache"):
                clear = getattr(layer, "clear_sft_buffer_cache", None)
                del layer
                if clear is not None:
                    clear()
                del clear


_collecting = threading.local()


@contextlib.contextmanager
def _collect_what_is_new() -> Iterator[None]:
    """Collect the cyclic garbage that the body leaves, so that the memory of its layer is free.

    Objects that exist already are frozen meanwhile: to look at all of torch's takes longer than most cases. So are
    those that came after an earlier freeze of this process, which ends here.
    """
    outermost = not getattr(_collecting, "now", False)
    if outermost:
        _collecting.now = True
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if outermost:
            _collecting.now = False
            gc.unfreeze()
