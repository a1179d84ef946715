"""Mutants of LoRA: its scale, its operands, and which values of it the engine uses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.hypotheses.rounding import cut_off
from ktverify.engines import argument_checks
from ktverify.mutants.base import Gradients, Group, Plain, mutant
from ktverify.spec.names import LORA_NAMES

# ---- scale


@mutant(Cause.LORA_SCALE, "forward/small")
class lora_scale_one(Plain):
    """s = 1 instead of lora_alpha / lora_rank."""

    def scale(self) -> float:
        return 1.0


@mutant(Cause.LORA_SCALE, "forward/small")
class lora_scale_of_rslora(Plain):
    """s = lora_alpha / sqrt(lora_rank), as in rank-stabilised LoRA."""

    def scale(self) -> float:
        return self.spec.lora_alpha / math.sqrt(self.spec.lora_rank)


@mutant(Cause.LORA_SCALE, "forward/rank_3")
class lora_scale_of_padded_rank(Plain):
    """s uses the rank padded to a multiple of 8."""

    def scale(self) -> float:
        return self.spec.lora_alpha / (-(-self.spec.lora_rank // 8) * 8)


@mutant(Cause.LORA_SCALE, "backward/small")
class lora_b_gradient_unscaled(Plain):
    """The gradients of the three LoRA B lack the factor s."""

    def lora_gradients(self, found: Gradients) -> Gradients:
        return {name: value / self.s if name.endswith("_b") else value for name, value in found.items()}


@mutant(Cause.LORA_SCALE, "backward/small")
class lora_a_gradient_scaled_twice(Plain):
    """The gradients of the three LoRA A have the factor s twice."""

    def lora_gradients(self, found: Gradients) -> Gradients:
        return {name: value * self.s if name.endswith("_a") else value for name, value in found.items()}


@mutant(Cause.LORA_SCALE, "backward/small")
class grad_input_without_lora(Plain):
    """grad_input goes through the base weights of gate and up only."""

    def gate_up_gradients(self, at: Group, dg: Tensor, du: Tensor) -> tuple[Tensor, Gradients]:
        _, found = super().gate_up_gradients(at, dg, du)
        gate, up, _ = at.base
        return self.product(dg, gate) + self.product(du, up), found


# ---- which values


class _Remembers(Plain):
    """Keeps the LoRA weights of before an update."""

    before: dict[str, Tensor]

    def _take_over(self) -> None:
        self.before = dict(self._lora)
        super()._take_over()


@mutant(Cause.STALE_LORA, "training/update", "rel_l2")
class update_does_nothing(_Remembers):
    """Always computes with the LoRA weights of init_lora_weights."""

    def update_lora_weights(self) -> None:
        return


@mutant(Cause.STALE_LORA, "training/update", "rel_l2")
class update_takes_half(_Remembers):
    """update_lora_weights leaves the LoRA of down out, so the engine computes with a mixture of old and new."""

    def update_lora_weights(self) -> None:
        super().update_lora_weights()
        self._lora.update({name: self.before[name] for name in LORA_NAMES[4:]})


@mutant(Cause.STALE_LORA, "training/update", "rel_l2")
class update_of_expert_0_only(_Remembers):
    """update_lora_weights copies expert 0 only."""

    def update_lora_weights(self) -> None:
        super().update_lora_weights()
        for name in LORA_NAMES:
            self._lora[name][1:] = self.before[name][1:]


@mutant(Cause.STALE_LORA, "training/update", "rel_l2")
class update_one_late(_Remembers):
    """Double-buffered LoRA whose buffers are exchanged after the copy: always one update late."""

    _latest: dict[str, Tensor] | None = None

    def update_lora_weights(self) -> None:
        late = self._lora if self._latest is None else self._latest
        super().update_lora_weights()
        self._latest, self._lora = self._lora, late


@mutant(Cause.STALE_LORA, "training/update", "bits")
class unsynchronised(Plain):
    """Computes with the parameters as they are, without update_lora_weights."""

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        return {name: getattr(self, name)[expert].detach().float() for name in LORA_NAMES}


@mutant(Cause.STALE_LORA, "training/update_between", "bits")
class backward_reads_the_parameters(Plain):
    """The backward reads the parameters of the optimizer instead of the weights of its forward."""

    def backward_of(self, at: Group, d_out: Tensor) -> tuple[Tensor, Gradients]:
        at.lora = {name: getattr(self, name)[at.expert].detach().float() for name in LORA_NAMES}
        return super().backward_of(at, d_out)


@mutant(Cause.STALE_LORA, "processes/update_while_forward_waits", "bits")
class backward_reads_the_last_update(Plain):
    """The backward uses the weights of the last update, not those of its forward."""

    def backward_of(self, at: Group, d_out: Tensor) -> tuple[Tensor, Gradients]:
        at.lora = self.lora_of(at.expert)
        return super().backward_of(at, d_out)


@mutant(Cause.STALE_LORA, "behaviour/failed_update", "bits")
class failed_update_takes_some(Plain):
    """update_lora_weights takes one tensor after the other, and keeps those before the one that it refuses."""

    def _take_over(self) -> None:
        for name in LORA_NAMES:
            given = {**{each: self._valid(each) for each in LORA_NAMES}, name: getattr(self, name)}
            self._lora[name] = argument_checks.check_lora(self.spec, given)[name].detach().clone()

    def _valid(self, name: str) -> Tensor:
        """The parameter `name` if it is valid, otherwise the layer's present value of it."""
        tensor: Tensor = getattr(self, name)
        fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == self.spec.lora_shapes[name]
        return tensor if fits and tensor.dtype in (torch.bfloat16, torch.float32) else self._lora.get(name, tensor)


@mutant(Cause.ACCUMULATION_TYPE, "training/fp32_parameters", "loss")
class update_by_truncated_differences(Plain):
    """An update adds the change of the parameters to a bf16 copy and truncates the sum: the copy drifts."""

    _last: dict[str, Tensor]

    def _take_over(self) -> None:
        given = argument_checks.check_lora(self.spec, {name: getattr(self, name) for name in LORA_NAMES})
        present = {name: tensor.detach().float().clone() for name, tensor in given.items()}
        before, dtype = self._lora, given[LORA_NAMES[0]].dtype
        if not before or before[LORA_NAMES[0]].dtype != dtype:
            super()._take_over()
        else:
            moved = {name: before[name].float() + (present[name] - self._last[name]) for name in LORA_NAMES}
            self._lora = {name: cut_off(value).to(dtype) for name, value in moved.items()}
        self._last = present


@mutant(Cause.ACCUMULATION_TYPE, "training/fp32_parameters", "loss")
class gradients_compressed_after_warm_up(Plain):
    """After three updates (a warm-up), LoRA gradients are quantised to 4 bits."""

    _updates = 0

    def update_lora_weights(self) -> None:
        super().update_lora_weights()
        self._updates += 1

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        gradient = tuple(value.shape) in {shape[1:] for shape in self.spec.lora_shapes.values()}
        if gradient and self._updates > 3 and value.any():
            step = value.abs().max() / 7
            value = torch.round(value / step) * step
        return super().stored(value, dtype)


@mutant(Cause.OTHER, "behaviour/outstanding_forwards", "bits")
class dropout_in_evaluation(Plain):
    """Dropout of 5 % on the LoRA input in forwards without a backward, where it must be off."""

    _evaluating = False

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        self._evaluating = not save
        return super()._forward(hidden_states, expert_ids, weights, save)

    def lora_of(self, expert: int) -> dict[str, Tensor]:
        lora = super().lora_of(expert)
        if self._evaluating:
            lora["gate_lora_a"][:, ::20] = 0
            lora["gate_lora_a"] /= 0.95
        return lora


@mutant(Cause.WRONG_PROJECTION, "backward/small")
class up_gradient_from_dg(Plain):
    """The gradient of up_lora_b uses dg instead of du."""

    def gate_up_gradients(self, at: Group, dg: Tensor, du: Tensor) -> tuple[Tensor, Gradients]:
        dx, found = super().gate_up_gradients(at, dg, du)
        if found:
            found["grad_up_lora_b"] = self.s * self.over_rows(dg, at.x_ua)
        return dx, found


@mutant(Cause.WRONG_PROJECTION, "backward/small")
class grad_input_without_up(Plain):
    """grad_input lacks the part of up."""

    def gate_up_gradients(self, at: Group, dg: Tensor, du: Tensor) -> tuple[Tensor, Gradients]:
        return super().gate_up_gradients(at, dg, torch.zeros_like(du))[0], super().gate_up_gradients(at, dg, du)[1]


@mutant(Cause.WRONG_PROJECTION, "forward/small")
class no_lora_on_down(Plain):
    """The forward lacks the LoRA term of down."""

    def down_lora(self, at: Group, b: Tensor) -> Tensor:
        return torch.zeros_like(at.x)


@mutant(Cause.OTHER, "behaviour/skip_lora", "stray")
class skip_lora_ignored(Plain):
    """The method SkipLoRA computes the LoRA gradients."""

    def __init__(self, **arguments: Any) -> None:
        method = str(arguments.get("method", "AMXBF16_SFT")).removesuffix("_SkipLoRA")
        super().__init__(**{**arguments, "method": method})
