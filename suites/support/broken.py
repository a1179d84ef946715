"""Engines with one defect each, on top of a right one: what the suite has to catch.

Each name in DEFECTS is a factory that takes KTMoEWrapper's keyword arguments, so that it can be judged by
`pytest suites/ --engine suites.support.broken:NAME`. The defect sits outside of the engine that it spoils (the
environment variable KTVERIFY_BROKEN_BASE names it; torch_bf16 by default), so it is the same for every engine.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ktverify import engines

BASE_ENV = "KTVERIFY_BROKEN_BASE"


class _Spoiled:
    """Hands every call and attribute to the right engine; subclasses spoil one call."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs
        self.layer = engines.find(os.environ.get(BASE_ENV, "torch_bf16"))(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("layer", "kwargs"):
            raise AttributeError(name)
        return getattr(self.layer, name)


class lora_scale_one(_Spoiled):
    """s = 1 instead of lora_alpha / lora_rank."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "lora_alpha": float(kwargs["lora_rank"])})


class gate_up_exchanged(_Spoiled):
    """silu is applied to the up projection."""

    def load_weights_from_tensors(self, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, *rest: Any) -> None:
        self.layer.load_weights_from_tensors(up_proj, gate_proj, down_proj, *rest)


class no_routing_weight_in_backward(_Spoiled):
    """dy = dO instead of w dO."""

    def forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> Tensor:
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids, weights, save_for_backward=False)
        if save_for_backward:
            self.layer.forward_sft(hidden_states, expert_ids, torch.ones_like(weights), save_for_backward=True)
        return output


class tp_part_lost(_Spoiled):
    """The last part's share of the sum over tensor-parallel parts is missing."""

    def load_weights_from_tensors(self, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, *rest: Any) -> None:
        parts = int(self.kwargs["threadpool_count"])
        down_proj = down_proj.clone()
        if parts > 1:
            down_proj[:, :, down_proj.shape[2] // parts * (parts - 1) :] = 0
        self.layer.load_weights_from_tensors(gate_proj, up_proj, down_proj, *rest)


class update_does_nothing(_Spoiled):
    """Computes with the LoRA weights of init_lora_weights for ever."""

    def update_lora_weights(self) -> None:
        return


class k_remainder_skipped(_Spoiled):
    """A reduction over hidden that stops at the last whole block of 32."""

    def forward_sft(self, hidden_states: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states.clone()
        hidden_states[:, hidden_states.shape[1] // 32 * 32 :] = 0
        output: Tensor = self.layer.forward_sft(hidden_states, *rest, **kwargs)
        return output


class idle_gradients_stale(_Spoiled):
    """The gradient of an expert that received no token is what the last call left there."""

    _ids: Tensor
    _last: dict[str, Tensor] | None = None

    def forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> Tensor:
        self._ids = expert_ids
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids, weights, save_for_backward=save_for_backward)
        return output

    def backward(self, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        grad_input, gradients = self.layer.backward(grad_output)
        if self._last is not None:
            idle = torch.ones(int(self.kwargs["num_experts"]), dtype=torch.bool)
            idle[self._ids[self._ids >= 0]] = False
            for name, gradient in gradients.items():
                gradient[idle] = self._last[name][idle]
        self._last = {name: gradient.clone() for name, gradient in gradients.items()}
        return grad_input, gradients


class expert_off_by_one(_Spoiled):
    """Every token meets the expert after the one that it was routed to."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        following = (expert_ids + 1) % int(self.kwargs["num_experts"])
        output: Tensor = self.layer.forward_sft(
            hidden_states, torch.where(expert_ids < 0, expert_ids, following), *rest, **kwargs
        )
        return output


DEFECTS: dict[str, type[_Spoiled]] = {
    kind.__name__: kind
    for kind in (
        lora_scale_one,
        gate_up_exchanged,
        no_routing_weight_in_backward,
        tp_part_lost,
        update_does_nothing,
        k_remainder_skipped,
        idle_gradients_stale,
        expert_off_by_one,
    )
}
