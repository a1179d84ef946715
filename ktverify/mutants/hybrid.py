"""Mutants of experts on another device: lost or doubled slots, values that one side alone gets, moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.judge.reference import routed
from ktverify.mutants.base import Gradients, Group, Outstanding, Plain, mutant
from ktverify.mutants.routes import Routes
from ktverify.spec.names import GRAD_NAMES, LORA_NAMES

DEVICE = Cause.OTHER_DEVICE

# ---- slots


@mutant(DEVICE, "hybrid/masks/one")
class slot_on_both_sides(Plain):
    """The engine computes the device's slots as well."""

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        return [expert_ids, *super().sides(expert_ids)[1:]]


@mutant(DEVICE, "hybrid/masks/one")
class slot_on_no_side(Plain):
    """The engine leaves the slots of masked experts out, and nothing computes them."""

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        return super().sides(expert_ids)[:1]


@mutant(DEVICE, "hybrid/masks/scattered")
class prefix_of_the_mask(Plain):
    """The device computes the first n experts, whichever n the mask names."""

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        engine, *_ = super().sides(expert_ids)
        return [engine, torch.where(expert_ids < self.spec.num_gpu_experts, expert_ids, -1)]


@mutant(DEVICE, "hybrid/masks/every_second")
class device_ids_not_renumbered(Plain):
    """The device holds its n experts in places 0 to n - 1, and reads the place of the expert's number in the layer."""

    def base_of(self, expert: int) -> Any:
        there = self.spec.gpu_experts
        return super().base_of(there[expert % len(there)] if expert in there else expert)


@mutant(DEVICE, "hybrid/slots/masked")
class masked_slot_is_the_devices_last(Plain):
    """An id of -1 is an index into the device's experts, which selects the last of them."""

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        engine, *device = super().sides(expert_ids)
        return [engine, *(torch.where(expert_ids < 0, self.spec.gpu_experts[-1], ids) for ids in device)]


@mutant(DEVICE, "hybrid/slots/duplicate")
class duplicate_counted_once_on_the_device(Plain):
    """An expert of the device that a token has twice counts once."""

    def routes(self, expert_ids: Tensor) -> Routes:
        for expert, rows, slots in routed(expert_ids):
            first = torch.ones(len(rows), dtype=torch.bool)
            first[1:] = rows[1:] != rows[:-1]
            keep = first if self.there(expert) else slice(None)
            yield expert, rows[keep], slots[keep]


# ---- factors and gradients


@mutant(DEVICE, "hybrid/scaling/device")
class routing_weight_twice_on_the_device(Plain):
    """The device multiplies its outputs by w, and the sum of both sides does so again."""

    def combine(self, output: Tensor, at: Group) -> None:
        output.index_add_(0, at.rows, at.w * at.y * (at.w if self.there(at.expert) else 1))


@mutant(DEVICE, "hybrid/scaling/both")
class scale_twice_on_the_device(Plain):
    """The device multiplies the LoRA term of down by s twice."""

    def down_lora(self, at: Group, b: Tensor) -> Tensor:
        return super().down_lora(at, b) * (self.s if self.there(at.expert) else 1)


@mutant(DEVICE, "hybrid/masks/all")
class no_routing_gradient_of_the_device(Plain):
    """The gradient of the routing weights is 0 in the device's slots."""

    def routing_gradient(self, at: Group, d_out: Tensor) -> Tensor:
        return super().routing_gradient(at, d_out) * (not self.there(at.expert))


@mutant(DEVICE, "hybrid/masks/one")
class no_grad_input_of_the_device(Plain):
    """grad_input has the engine's part alone."""

    def collect(self, grad_input: Tensor, at: Group, dx: Tensor) -> None:
        if not self.there(at.expert):
            super().collect(grad_input, at, dx)


@mutant(DEVICE, "hybrid/idle_experts", "raised")
class idle_device_gives_none(Plain):
    """A backward without a slot on the device returns None in place of the LoRA gradients."""

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        grad_input, found = super()._backward(saved, grad_output)
        idle = self.spec.num_gpu_experts and not any(self.there(at.expert) for at in saved.groups)
        return grad_input, dict.fromkeys(GRAD_NAMES) if idle else found  # type: ignore[return-value]


@mutant(DEVICE, "hybrid/idle_experts", "stray")
class idle_gradients_of_the_device_stale(Plain):
    """The gradient of a device's expert without a token is that of the call before."""

    _last: Gradients | None = None

    def empty_gradients(self, saved: Outstanding) -> Gradients:
        found = super().empty_gradients(saved)
        for name, before in (self._last or {}).items():
            found[name][list(self.spec.gpu_experts)] = before[list(self.spec.gpu_experts)]
        return found

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        grad_input, found = super()._backward(saved, grad_output)
        self._last = {name: gradient.clone() for name, gradient in found.items()}
        return grad_input, found


@mutant(DEVICE, "hybrid/empty_side", "raised")
class empty_device_raises(Plain):
    """A call without a slot on the device is an error."""

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        found = super().sides(expert_ids)
        for ids in found[1:]:
            if not bool((ids >= 0).any()):
                raise RuntimeError("cannot launch 0 blocks")
        return found


# ---- LoRA


@mutant(DEVICE, "hybrid/update", "bits")
class lora_of_the_device_stale(Plain):
    """update_lora_weights reaches the engine's experts alone; the device keeps the LoRA of init_lora_weights."""

    _first: dict[str, Tensor] | None = None

    def init_lora_weights(self, *given: Any, **named: Any) -> None:
        super().init_lora_weights(*given, **named)
        self._first = {name: tensor.clone() for name, tensor in self._lora.items()}

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        values = self._first if self._first is not None and self.there(expert) else self._lora
        return {name: values[name][expert].float() for name in LORA_NAMES}


@mutant(DEVICE, "hybrid/update", "bits")
class lora_of_the_device_unsynchronised(Plain):
    """The device reads the parameters themselves, so that a step without update_lora_weights reaches it alone."""

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        if not self.there(expert):
            return super().lora_of(expert)
        return {name: getattr(self, name).detach()[expert].float() for name in LORA_NAMES}


# ---- moves and waiting forwards


@mutant(DEVICE, "hybrid/moved", "bits")
class moved_without_lora(Plain):
    """An expert that moves to the device has no LoRA there until the next update."""

    _arrived: frozenset[int] = frozenset()

    def set_gpu_experts_mask(self, gpu_experts_mask: Any) -> None:
        before = set(self.spec.gpu_experts)
        super().set_gpu_experts_mask(gpu_experts_mask)
        self._arrived = frozenset(self.spec.gpu_experts) - before

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        found = super().lora_of(expert)
        return {name: torch.zeros_like(value) for name, value in found.items()} if expert in self._arrived else found


@mutant(DEVICE, "hybrid/moved", "bits")
class device_stays_at_the_first_mask(Plain):
    """After set_gpu_experts_mask the engine leaves out the experts of the new mask; the device still computes those of
    the first."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._of_device = self.spec.gpu_experts

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        engine, *_ = super().sides(expert_ids)
        there = torch.isin(expert_ids, torch.tensor(self._of_device, dtype=torch.int64))
        return [engine, torch.where(there, expert_ids, -1)]


@mutant(DEVICE, "hybrid/moved_while_waiting", "bits")
class backward_on_the_new_sides(Plain):
    """The backward of a forward that waited over a move leaves out the experts that have changed sides."""

    _sides_of: tuple[int, ...] = ()

    def save(self, saved: Outstanding) -> None:
        super().save(saved)
        self._sides_of = self.spec.gpu_experts

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        moved = set(self._sides_of) ^ set(self.spec.gpu_experts)
        saved.groups = [at for at in saved.groups if at.expert not in moved]
        return super()._backward(saved, grad_output)


@mutant(DEVICE, "hybrid/waiting_forwards", "bits")
class device_keeps_one_forward(Plain):
    """The device saves one forward: a backward of an older one has the engine's part alone."""

    _newest: Outstanding | None = None

    def save(self, saved: Outstanding) -> None:
        super().save(saved)
        self._newest = saved

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        if saved is not self._newest:
            saved.groups = [at for at in saved.groups if not self.there(at.expert)]
        return super()._backward(saved, grad_output)


@mutant(DEVICE, "hybrid/methods", "bits")
class device_multiplies_codes_twice(Plain):
    """The device quantises weights that codes stand for once more: to 8 bits, with a scale for each row."""

    def base_of(self, expert: int) -> Any:
        found = super().base_of(expert)
        if self.spec.weight_format == "bf16" or not self.there(expert):
            return found
        scales = [matrix.abs().amax(1, keepdim=True) / 127 for matrix in found]
        return tuple((matrix / scale).round() * scale for matrix, scale in zip(found, scales, strict=True))


@mutant(DEVICE, "hybrid/repeats", "bits")
class device_adds_in_any_order(Plain):
    """Atomic additions on the device: one element of the output is a unit off in every other call."""

    _calls = 0

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        output = super()._forward(hidden_states, expert_ids, weights, save)
        self._calls += 1
        if self.spec.num_gpu_experts and output.numel() and self._calls % 2:
            output.view(torch.int16)[0, 0] ^= 1
        return output


@mutant(DEVICE, "hybrid/count", "bits")
class number_without_a_mask(Plain):
    """Without a mask, num_gpu_experts=n makes the engine leave out the first n experts, and no device computes them."""

    def sides(self, expert_ids: Tensor) -> list[Tensor]:
        found = super().sides(expert_ids)
        return found[:1] if self.spec.gpu_experts_mask is None else found
