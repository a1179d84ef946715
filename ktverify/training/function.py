"""The engine as one node of torch's autograd.

Comes in: tensors on the CPU and a loaded engine. Goes out: the output, and gradients in whatever order they are asked
for. What a forward leaves in the engine is named by a ticket, and the ticket is a tensor: whoever drops it (a freed
graph, a checkpoint that keeps nothing) frees the memory behind it.
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
    """One call of an engine. save: a backward may follow. room: forwards that may wait in the engine at a time.

    lora_version counts the engine's updates of its LoRA; a forward that has to be repeated must find the same one.
    """

    engine: KTMoEWrapper
    lora_version: int
    current_version: Any  # () -> int
    save: bool
    room: int


class MOEAMXFunction(torch.autograd.Function):
    """hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32, Call, six LoRA tensors -> [T, H] bf16.

    Gradients: hidden_states, weights, and the LoRA tensors in their dtype, in the shapes of `names.lora_shapes`;
    the engine computes with the values of its last update, the six tensors given here only receive the gradients.

    Forwards may wait for their backward in any number and order. As many as `room` keep what backward needs in the
    engine; one that found no room, or whose backward runs a second time (retain_graph), is computed again, which gives
    the same bits. RuntimeError if its LoRA is no longer the engine's.
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
        # through numpy: a used ticket is no change of a saved tensor that autograd should object to
        ticket.numpy()[...] = 0
        d_lora = [grads[name] for name in GRAD_NAMES] if ctx.trained else []
        return grad_input, None, engine.grad_weights, None, *d_lora


def _ticket_tensor(engine: KTMoEWrapper, number: int) -> torch.Tensor:
    """int64 [] that holds a ticket; when its storage goes, the engine forgets what was saved under it.

    The storage is numpy's, so that an object of Python lives exactly as long as the storage does: a tensor's Python
    object may come and go while autograd keeps the tensor.
    """
    array = np.array(number, dtype=np.int64)
    if number:
        # weakly, or a graph that nobody frees would keep the engine and its weights
        weakref.finalize(array, _forget, weakref.ref(engine), number).atexit = False
    return torch.from_numpy(array)


def _forget(engine: weakref.ref[KTMoEWrapper], number: int) -> None:
    alive = engine()
    if alive is not None:
        alive.drop(number)
