"""The engine as one node of torch's autograd, with backwards in any order.

A ticket names what a forward saved in the engine. The ticket is a tensor: when it is freed, with its graph or by a
checkpoint that keeps nothing, the engine frees the saved forward.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.spec.names import GRAD_NAMES


@dataclass(frozen=True)
class Call:
    """One call of an engine. save: a backward may follow. room: most forwards that may wait in the engine.

    lora_version counts the updates of the engine's LoRA; a forward may be repeated only under the same version.
    """

    engine: KTMoEWrapper
    lora_version: int
    current_version: Any  # () -> int
    save: bool
    room: int


class MOEAMXFunction(torch.autograd.Function):
    """hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32, Call, six LoRA tensors -> [T, H] bf16.

    Gradients: hidden_states, weights, and the LoRA tensors in their dtype and the shapes of `names.lora_shapes`. The
    engine computes with the values of its last update; the six tensors here only receive the gradients.

    Forwards may wait for their backward in any number and order. The engine saves `room` of them. A forward that was
    not saved, or whose backward runs a second time (retain_graph), is computed again, with the same bits. RuntimeError
    if the engine's LoRA has changed since.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        call: Call,
        *lora: torch.Tensor,
    ) -> torch.Tensor:
        engine = call.engine
        save = call.save and engine.saved_forwards < call.room
        output = engine.forward_sft(hidden_states, expert_ids, weights, save_for_backward=save)
        if call.save:
            ctx.call = call
            ctx.trained = len(lora)
            ctx.save_for_backward(hidden_states, expert_ids, weights, _ticket_tensor(engine, engine.last_ticket))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, expert_ids, weights, ticket = ctx.saved_tensors
        engine: KTMoEWrapper = ctx.call.engine
        number = int(ticket)
        if number == 0:
            if ctx.call.current_version() != ctx.call.lora_version:
                raise RuntimeError(
                    "this backward needs its forward again (max_cache_depth forwards were waiting, or its graph was "
                    "used before), but the LoRA weights have changed since; raise max_cache_depth, or call backward "
                    "before the optimizer's step"
                )
            engine.forward_sft(hidden_states, expert_ids, weights, save_for_backward=True)
            number = engine.last_ticket
        grad_input, grads = engine.backward(grad_output.to(torch.bfloat16), ticket=number)
        # written through numpy, because autograd refuses a changed saved tensor and a used ticket is none
        ticket.numpy()[...] = 0
        d_lora = [grads[name] for name in GRAD_NAMES] if ctx.trained else []
        return grad_input, None, engine.grad_weights, None, *d_lora


def _ticket_tensor(engine: KTMoEWrapper, number: int) -> torch.Tensor:
    """A ticket as int64 []; when its storage is freed, the engine drops the saved forward.

    The storage is a numpy array, a Python object that lives exactly as long as the storage. A tensor's Python object
    may be freed and made again while autograd keeps the tensor.
    """
    array = np.array(number, dtype=np.int64)
    if number:
        # a weak reference, or a graph that is never freed would keep the engine and its weights
        weakref.finalize(array, _forget, weakref.ref(engine), number).atexit = False
    return torch.from_numpy(array)


def _forget(engine: weakref.ref[KTMoEWrapper], number: int) -> None:
    alive = engine()
    if alive is not None:
        alive.drop(number)
