"""One block of routed experts, computed by the engine as one node of torch's autograd, with peft's adapters.

All parameters belong to peft. A ticket names what a forward saved in the engine. It is a tensor: when it is freed, with
its graph or by a checkpoint that keeps nothing, the engine frees the saved forward.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ktverify.engines import argument_checks
from ktverify.engines.expert_parallel import Share
from ktverify.engines.native import layer
from ktverify.engines.native.checkpoint import ExpertFiles
from ktverify.engines.native.turns import in_turn, list_of_this_thread
from ktverify.engines.plain_tensors import check_modes
from ktverify.spec.names import GRAD_NAMES
from ktverify.training import capture
from ktverify.training.factors import Adapter, Factors, dtype_of, engine_lora, rank_of
from ktverify.training.infer import CpuInfer

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """`function`, left out of the graphs of torch.compile, which would trace tensors that have no memory."""
    disable: Any = torch.compiler.disable
    reason = "the engine computes the routed experts outside of torch, so a graph ends there: leave fullgraph=True out"
    left_out: _Function = disable(function, reason=reason)
    return left_out


class MOELayerWrapper(nn.Module):
    """E experts: hidden_states [T, H], expert_ids [T, k], weights [T, k] -> output [T, H], any float dtype and device.

    The engine computes on the CPU, in bf16 with fp32 sums; other tensors are converted and back. Before every call the
    adapters' parameters are compared with those of the engine, by a fingerprint of all their bytes: no counter shows
    all ways of writing. Changed ones are given to the engine, so no call is needed after an optimizer's step.
    With `auto_update = False`, a call with changed parameters raises RuntimeError until `update_lora_pointers()`; to
    switch adapters, or to disable and enable one, is no change.
    """

    def __init__(
        self,
        layer_idx: int,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        infer: CpuInfer,
        files: tuple[str, int] | None = None,
        share: Share | None = None,
    ) -> None:
        """gate_up_proj [E, 2 I, H] (gate before up), down_proj [E, H, I]: bf16, CPU; kept until the first forward.

        files: the checkpoint and the number of its layer that has the weights; then only the shapes of the tensors
        count. Errors of ExpertFiles, which looks at the whole layer. share: of experts divided among processes; these
        are those of this process."""
        super().__init__()
        self.layer_idx = layer_idx
        self.infer = infer
        self.num_experts, self.hidden_size, self.intermediate_size = down_proj.shape
        argument_checks.check_tp(self.intermediate_size, infer.tp)
        self.gpu_experts_mask = infer.gpu.mask(layer_idx, self.num_experts)
        self.auto_update = True
        self.share = share
        self.block: tuple[nn.Module] | None = None  # the model's block around the experts; in a tuple: no submodule
        self.adapters: dict[str, Adapter] = {}
        self.engine: layer.KTMoEWrapper | None = None
        self.files = files
        self._sources: tuple[torch.Tensor, torch.Tensor] | None = None if files else (gate_up_proj, down_proj)
        if files:
            ExpertFiles(argument_checks.LayerSpec(**self._arguments(1, infer.method)), **self._place())
        self._rank, self._scaling = 1, 0.0  # of the engine; scaling 0.0 until it has LoRA
        self._dtype: torch.dtype | None = None  # of the engine's LoRA
        self._held: object = None  # the key of the engine's present values
        # adapter -> key and version of its last values, and its parameters: while they live, no other has their id()
        self._taken: dict[object, tuple[object, int, tuple[torch.Tensor, ...]]] = {}
        self._versions = itertools.count(1)
        self._version = 0  # equal for equal values

    @in_turn
    def __getstate__(self) -> dict[str, Any]:
        """The weights as tensors, or the files that have them: the copy's first forward builds the engine again."""
        notes: dict[str, Any] = {"block": None, "_held": None, "_taken": {}, "_versions": None, "_version": 0}
        return {**self.__dict__, "_sources": None if self.files else self._base(), "engine": None, **notes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_versions": itertools.count(1)})  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> MOELayerWrapper:
        state = self.__getstate__()
        sources = state.pop("_sources")  # new tensors already, or frozen ones that the copy may share
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__({**copy.deepcopy(state, memo), "_sources": sources})
        return made

    def _base(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up_proj and down_proj: those given, or, once the engine has them, new tensors with their values."""
        if self._sources is not None:
            return self._sources
        assert self.engine is not None
        base = self.engine.base_weights()
        return torch.cat([base["gate_proj"], base["up_proj"]], dim=1), base["down_proj"]

    @property
    def calling(self) -> list[Adapter]:
        """The adapters that the current call of this thread passed through."""
        return list_of_this_thread(self)

    @property
    def lora_params(self) -> dict[str, nn.Parameter]:
        """The trained parameters as peft stores them: gate_up_lora_a [E r, H], gate_up_lora_b [2 I, r E], down_lora_a
        [E r, I], down_lora_b [H, r E]; {} without an adapter on the experts."""
        found: dict[str, nn.Parameter] = {}
        for parameter, adapter in self.adapters.items():
            factors = adapter.held()
            if factors is not None:
                short = parameter.removesuffix("_proj")
                found.update({f"{short}_lora_a": factors.a, f"{short}_lora_b": factors.b})  # type: ignore[dict-item]
        return found

    @in_turn
    def update_lora_pointers(self) -> None:
        """Give the engine the present values of all adapters. Every forward that finds them changed calls it.

        Does nothing before the first forward, which builds the engine because it knows k."""
        if self.engine is not None:
            self._synchronise(self.adapters.values(), self.engine.spec.num_experts_per_tok, True)

    @in_turn
    def set_gpu_experts_mask(self, gpu_experts_mask: torch.Tensor | list[bool]) -> None:
        """Compute these experts, bool [E], on the GPU from now on, and the others in the engine."""
        mask = list(argument_checks.check_gpu_experts_mask(self.num_experts, gpu_experts_mask))
        if self.engine is not None:
            self.engine.set_gpu_experts_mask(mask)
        self.gpu_experts_mask = mask

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """With hidden_states alone, of any shape that the model gives it, the model's whole block: its router chooses
        ids and weights. RuntimeError in a copy, which belongs to no model."""
        if expert_ids is not None and weights is not None:
            return self._experts(hidden_states, expert_ids, weights)
        if self.block is None:
            raise RuntimeError("these experts have no router: give expert_ids and weights, or call the model's block")
        output: torch.Tensor = self.block[0](hidden_states)
        return output

    @in_turn
    def _experts(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        calling = list(self.calling)
        self.calling.clear()
        check_modes()
        lora = self._synchronise(calling, expert_ids.shape[-1], self.auto_update)
        x = hidden_states.to("cpu", torch.bfloat16)
        ids = expert_ids.detach().to("cpu", torch.int64)
        w = weights.to("cpu", torch.float32)
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w, *lora))
        engine = self.engine
        assert engine is not None
        call = Call(engine, self._version, lambda: self._version, save, self.infer.max_cache_depth)
        rows = self.infer.chunked_prefill_size
        apply: Any = MOEAMXFunction.apply
        pieces = [
            apply(x[at : at + rows], ids[at : at + rows], w[at : at + rows], call, *lora)
            for at in range(0, max(1, len(x)), rows)
        ]
        output: torch.Tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return output.to(hidden_states.device, hidden_states.dtype)

    # ---- from peft's parameters to the engine's

    def _synchronise(self, calling: Iterable[Adapter], top_k: int, may_update: bool) -> tuple[torch.Tensor, ...]:
        """Give the engine the six LoRA tensors of this call and return them, differentiable; () without LoRA, and where
        no gradient is wanted and the engine has them already."""
        factors = {a.parameter_name: f for a in calling if (f := a.factors()) is not None}
        # of all that are attached, so that they can be switched
        attached = [*factors.values(), *(f for a in self.adapters.values() for f in a.attached())]
        dtype = dtype_of(attached)
        if self.engine is None or not self._has_room(attached, dtype):
            self._build(attached, top_k)
        if dtype != self._dtype:
            self._dtype, self._held, self._taken = dtype, None, {}
        assert self.engine is not None
        values = self.engine.fingerprint([t for _, f in sorted(factors.items()) for t in (f.a, f.b)])
        key = tuple((name, f.scaling) for name, f in sorted(factors.items())), values
        # a Parameter stays the same object when its values, or even their address, change
        parameters = tuple(t for _, f in sorted(factors.items()) for t in (f.a, f.b))
        adapter = (*sorted(factors), *map(id, parameters))
        changed = key != self._held
        # after the fingerprint, so that the next call finds what is written in between
        lora = engine_lora(factors, self.engine.spec, dtype) if changed or torch.is_grad_enabled() else []
        if changed:
            living = {id(t) for f in attached for t in (f.a, f.b)}
            self._taken = {a: taken for a, taken in self._taken.items() if living.issuperset(map(id, taken[2]))}
            before, version, _ = self._taken.get(adapter, (None, 0, ()))
            same = before == key
            if version and not same and not may_update:
                raise RuntimeError(
                    f"the LoRA parameters of MoE layer {self.layer_idx} changed since the engine took them over, and "
                    "auto_update is off: call update_lora_pointers() after the optimizer's step"
                )
            self._load(lora, dtype)
            self._version = version if version and same else next(self._versions)  # equal for equal values
            self._held, self._taken[adapter] = key, (key, self._version, parameters)
        return tuple(lora)

    def _has_room(self, factors: list[Factors], dtype: torch.dtype) -> bool:
        """Whether the engine takes these factors: a smaller rank is padded, B contains the scaling, and the dtype may
        change while no forward waits."""
        assert self.engine is not None
        spec = self.engine.spec
        if factors and (not spec.lora_backward or rank_of(factors, self.num_experts) > spec.lora_rank):
            return False
        return dtype == self._dtype or not self.engine.saved_forwards

    def _build(self, attached: list[Factors], top_k: int) -> None:
        """Build the engine for the largest rank of `attached` and the scaling of the first, or those of an earlier one,
        whose results it gives bit for bit."""
        base = None if self.files else self._base()
        rank, scaling = self._rank, self._scaling
        if attached:
            rank = max(rank, rank_of(attached, self.num_experts))
            scaling = scaling or next((f.scaling for f in attached if 0 < f.scaling < math.inf), 1.0)
        method = self.infer.method if attached else f"{self.infer.method}{argument_checks.WITHOUT_LORA}"
        engine = layer.KTMoEWrapper(
            **self._arguments(top_k, method), lora_rank=rank, lora_alpha=(scaling or 1.0) * rank, isa=self.infer.isa
        )
        if base is None:
            engine.load_weights(**self._place())
        else:
            (gate_up, down), half = base, self.intermediate_size
            identity = torch.arange(self.num_experts, device="cpu")
            engine.load_weights_from_tensors(gate_up[:, :half], gate_up[:, half:], down, identity)
        self.engine, self._rank, self._scaling = engine, rank, scaling
        self._sources = None  # the engine has them now, and releases what it has packed
        self._held, self._taken = None, {}

    def _place(self) -> dict[str, Any]:
        """Which of the files' experts these are, as the engine's load_weights takes it."""
        return {} if self.share is None else {"first": self.share.experts.start, "total": self.share.total}

    def _arguments(self, top_k: int, method: str) -> dict[str, Any]:
        """The constructor's arguments, but for the LoRA's."""
        path, number = self.files or ("", self.layer_idx)
        return {
            "layer_idx": number,
            "num_experts": self.num_experts,
            "num_experts_per_tok": top_k,
            "hidden_size": self.hidden_size,
            "moe_intermediate_size": self.intermediate_size,
            "cpuinfer_threads": self.infer.threads,
            "threadpool_count": self.infer.tp,
            "weight_path": path,
            "chunked_prefill_size": self.infer.chunked_prefill_size,
            "method": method,
            "max_cache_depth": self.infer.max_cache_depth,
            "gpu_experts_mask": self.gpu_experts_mask,
            "gpu_device": self.infer.gpu.device,
            "numa_nodes": self.infer.numa_nodes,
        }

    def _load(self, lora: list[torch.Tensor], dtype: torch.dtype) -> None:
        engine = self.engine
        assert engine is not None
        shapes = engine.spec.lora_shapes.values()
        values = [t.detach().contiguous() for t in lora]
        values = values or [torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes]
        engine.init_lora_weights(*values)


# ---- autograd


@dataclass(frozen=True)
class Call:
    """One call of an engine. save: a backward may follow. room: most forwards that may wait in the engine.

    lora_version counts the updates of the engine's LoRA; a forward may be repeated only under the same version.
    """

    engine: layer.KTMoEWrapper
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
        output, ticket = engine.forward_with_ticket(hidden_states, expert_ids, weights, save=call.save, room=call.room)
        captured = capture.current()
        noted = None
        if captured is not None:
            noted = captured.forward(engine, hidden_states, expert_ids, weights, engine.gate_lora_a.dtype)
        if call.save:
            ctx.noted = (captured, noted)
            ctx.call = call
            ctx.trained = len(lora)
            ctx.save_for_backward(hidden_states, expert_ids, weights, _ticket_tensor(engine, ticket))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, expert_ids, weights, ticket = ctx.saved_tensors
        engine: layer.KTMoEWrapper = ctx.call.engine
        number = int(ticket)
        if number == 0:
            number = _forward_again(ctx.call, hidden_states, expert_ids, weights)
        grad_output = grad_output.to(torch.bfloat16)
        grad_input, grads, grad_weights = engine.backward_of(number, grad_output)
        captured, noted = ctx.noted
        if noted is not None:
            captured.backward(noted, grad_output)
        # written through numpy, because autograd refuses a changed saved tensor and a used ticket is none
        ticket.numpy()[...] = 0
        d_lora = [grads[name] for name in GRAD_NAMES] if ctx.trained else []
        return grad_input, None, grad_weights, None, *d_lora


@in_turn
def _forward_again(call: Call, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> int:
    """The ticket of the same forward. It waits beside all others, because its backward follows at once."""
    if call.current_version() != call.lora_version:
        raise RuntimeError(
            "this backward needs its forward again (max_cache_depth forwards were waiting, or its graph was "
            "used before), but the LoRA weights have changed since; raise max_cache_depth, or call backward "
            "before the optimizer's step"
        )
    return call.engine.forward_with_ticket(hidden_states, expert_ids, weights, room=argument_checks.LARGEST)[1]


def _ticket_tensor(engine: layer.KTMoEWrapper, number: int) -> torch.Tensor:
    """A ticket as int64 []; when its storage is freed, the engine drops the saved forward.

    The storage is a numpy array, a Python object that lives exactly as long as the storage. A tensor's Python object
    may be freed and made again while autograd keeps the tensor.
    """
    array = np.array(number, dtype=np.int64)
    if number:
        # a weak reference, or a graph that is never freed would keep the engine and its weights
        weakref.finalize(array, _forget, weakref.ref(engine), number).atexit = False
    return torch.from_numpy(array)


def _forget(engine: weakref.ref[layer.KTMoEWrapper], number: int) -> None:
    alive = engine()
    if alive is not None:
        alive.drop(number)
