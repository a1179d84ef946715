"""Engines with one defect each, on top of a right one: what the suite has to catch.

Each class is a factory that takes KTMoEWrapper's keyword arguments, so that it can be judged by
`pytest suites/ --engine suites.support.broken:NAME`. The defect sits outside of the engine that it spoils (the
environment variable KTVERIFY_BROKEN_BASE names it; torch_bf16 by default), so it is the same for every engine.
"""

from __future__ import annotations

import os
import signal
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


class unsynchronised(_Spoiled):
    """Computes with parameters that were not handed over."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        self.layer.update_lora_weights()
        output: Tensor = self.layer.forward_sft(*args, **kwargs)
        return output


class update_takes_half(_Spoiled):
    """update_lora_weights forgets the LoRA of down, so that the engine computes with a mixture."""

    def update_lora_weights(self) -> None:
        names = ("down_lora_a", "down_lora_b")
        present = {name: getattr(self.layer, name) for name in names}
        for name, first in zip(names, self._first, strict=True):
            setattr(self.layer, name, first)
        self.layer.update_lora_weights()
        for name in names:
            setattr(self.layer, name, present[name])

    def init_lora_weights(self, *given: Tensor) -> None:
        self._first = [tensor.clone() for tensor in given[4:]]
        self.layer.init_lora_weights(*given)


class results_reused(_Spoiled):
    """Every forward returns the same buffer."""

    _buffer: Tensor | None = None

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(*args, **kwargs)
        if self._buffer is None or self._buffer.shape != output.shape:
            self._buffer = output
        return self._buffer.copy_(output)


class input_scaled_in_place(_Spoiled):
    """Works in the caller's hidden_states and does not quite restore them."""

    def forward_sft(self, hidden_states: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(hidden_states, *rest, **kwargs)
        hidden_states[-1:, -1:] *= 1.5
        return output


class nan_spreads(_Spoiled):
    """One token that is not finite spoils the whole batch."""

    def forward_sft(self, hidden_states: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(hidden_states, *rest, **kwargs)
        return output if bool(torch.isfinite(hidden_states).all()) else output * float("nan")


class nan_hidden(_Spoiled):
    """NaN and Inf come out as zero."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(*args, **kwargs)
        return output.nan_to_num(0.0, 0.0, 0.0)


class physical_map_ignored(_Spoiled):
    """Slot p holds expert p, whatever the map says."""

    def load_weights_from_tensors(
        self, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, physical_map: Tensor
    ) -> None:
        self.layer.load_weights_from_tensors(gate_proj, up_proj, down_proj, torch.arange(len(physical_map)))


class never_the_same(_Spoiled):
    """Sums in an order that depends on the moment: one element is a unit off every other time."""

    _calls = 0

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer.forward_sft(*args, **kwargs)
        self._calls += 1
        if output.numel() and self._calls % 2:
            output.view(torch.int16)[0, 0] ^= 1
        return output


class oldest_first(_Spoiled):
    """backward takes the forward that has waited longest."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> Tensor:
        if save_for_backward:
            self._waiting.append((hidden_states, expert_ids, weights))
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids, weights, save_for_backward=False)
        return output

    def backward(self, grad_output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.layer.forward_sft(*self._waiting.pop(0), save_for_backward=True)
        result: tuple[Tensor, dict[str, Tensor]] = self.layer.backward(grad_output)
        return result


class ids_clamped(_Spoiled):
    """An expert id that does not exist is taken for the nearest that does."""

    def forward_sft(self, hidden_states: Tensor, expert_ids: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        last = int(self.kwargs["num_experts"]) - 1
        output: Tensor = self.layer.forward_sft(hidden_states, expert_ids.clamp(-1, last), *rest, **kwargs)
        return output


class dies(_Spoiled):
    """Ends its process with a signal."""

    def forward_sft(self, *args: Any, **kwargs: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("still alive")
