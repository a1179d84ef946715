"""Mutants of state: buffers, outstanding forwards, the caller's memory, threads, refusals, resources."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.mutants.base import Gradients, Group, Matrices, Outstanding, Plain, mutant

# ---- stale values


@mutant(Cause.STALE_VALUES, "behaviour/idle_experts", "stray")
class idle_gradients_stale(Plain):
    """The gradient of an expert without a token is that of the last call."""

    _last: Gradients | None = None

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        grad_input, gradients = super()._backward(saved, grad_output)
        idle = torch.ones(self.spec.num_experts, dtype=torch.bool)
        idle[[at.expert for at in saved.groups]] = False
        for name, before in (self._last or {}).items():
            gradients[name][idle] = before[idle]
        self._last = {name: gradient.clone() for name, gradient in gradients.items()}
        return grad_input, gradients


@mutant(Cause.STALE_VALUES, "backward/mostly_idle", "stray")
class idle_experts_beyond_32_not_cleared(Plain):
    """The set of active experts has 32 bits: idle experts above 31 are not cleared and contain tiny numbers."""

    def empty_gradients(self, saved: Outstanding) -> Gradients:
        gradients = super().empty_gradients(saved)
        for gradient in gradients.values():
            # a small integer read as a float
            gradient[32:] = 1e-38
        return gradients


@mutant(Cause.STALE_VALUES, "behaviour/varying_tokens", "bits")
class rows_left_from_a_longer_call(Plain):
    """Row 32 of an earlier, longer call stays in the buffer and is added to row 0 of a shorter one."""

    _left: Tensor | None = None

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        output = super()._forward(hidden_states, expert_ids, weights, save)
        if len(output) > 32:
            self._left = output[32].clone()
        elif self._left is not None and len(output):
            output[0] += self._left
        return output


@mutant(Cause.STALE_VALUES, "behaviour/reload", "bits")
class packed_weights_outlive_a_reload(Plain):
    """Experts are packed at their first use, and not again after other weights are loaded."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._packed: dict[int, Matrices] = {}

    def base_of(self, expert: int) -> Matrices:
        return self._packed.setdefault(expert, super().base_of(expert))


@mutant(Cause.STALE_VALUES, "behaviour/two_layers", "bits")
class layers_share_a_buffer(Plain):
    """All layers save h for the backward in one buffer."""

    _shared: ClassVar[dict[int, Tensor]] = {}

    def expert(self, at: Group) -> None:
        super().expert(at)
        self._shared[at.expert] = at.h

    def down_gradients(self, at: Group, dy: Tensor) -> tuple[Tensor, Gradients]:
        left = self._shared[at.expert]
        rows, columns = min(len(left), len(at.h)), min(left.shape[1], at.h.shape[1])
        at.h[:rows, :columns] = left[:rows, :columns]
        return super().down_gradients(at, dy)


@mutant(Cause.STALE_VALUES, "behaviour/nothing_is_written", "written")
class results_reused(Plain):
    """Every forward returns the same buffer."""

    _buffer: Tensor | None = None

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        output = super()._forward(hidden_states, expert_ids, weights, save)
        if self._buffer is None or self._buffer.shape != output.shape:
            self._buffer = output
        return self._buffer.copy_(output)


@mutant(Cause.STALE_VALUES, "behaviour/gradient_accumulation", "rel_l2")
class gradients_accumulate_inside(Plain):
    """LoRA gradients are added to those of the previous backward, which is the task of the caller."""

    _total: Gradients | None = None

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        grad_input, gradients = super()._backward(saved, grad_output)
        for name, before in (self._total or {}).items():
            gradients[name] += before
        self._total = {name: gradient.clone() for name, gradient in gradients.items()}
        return grad_input, gradients


# ---- outstanding forwards


@mutant(Cause.ORDER, "behaviour/outstanding_forwards", "bits")
class oldest_first(Plain):
    """backward uses the oldest outstanding forward with as many rows, not the newest."""

    def _backward(self, saved: Any, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        fits = [place for place, other in enumerate(self._saved) if other.rows == saved.rows]
        if fits:
            oldest = self._saved[fits[0]]
            self._saved[fits[0]] = saved
            saved = oldest
        return super()._backward(saved, grad_output)


@mutant(Cause.ORDER, "behaviour/outstanding_forwards", "bits")
class unsaved_forward_overwrites(Plain):
    """A forward without save_for_backward overwrites h of the newest saved forward."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        before = list(self._saved)
        output = super()._forward(hidden_states, expert_ids, weights, save=True)
        if not save:
            mine: Any = self._saved.pop()
            for at in before[-1].groups if before else ():  # type: ignore[attr-defined]
                for other in (each for each in mine.groups if each.expert == at.expert):
                    rows = min(len(at.h), len(other.h))
                    at.h[:rows] = other.h[:rows]
        return output


@mutant(Cause.ORDER, "behaviour/clear_cache", "raised")
class clearing_drops_outstanding(Plain):
    """clear_sft_buffer_cache drops the saved tensors of outstanding forwards."""

    _alive: ClassVar[list[Plain]] = []

    def save(self, saved: Outstanding) -> None:
        super().save(saved)
        type(self)._alive = [self]

    @classmethod
    def clear_sft_buffer_cache(cls) -> None:
        """Clears too much."""
        for layer in cls._alive:
            layer._saved.clear()


# ---- the caller's memory


@mutant(Cause.MEMORY_LAYOUT, "behaviour/strides", "bits")
class strides_ignored(Plain):
    """The memory of hidden_states is read as if it were contiguous."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        flat = hidden_states
        if not hidden_states.is_contiguous() and hidden_states.numel():
            flat = hidden_states.as_strided(hidden_states.shape, (hidden_states.shape[1], 1)).clone()
        return super()._forward(flat, expert_ids, weights, save)


@mutant(Cause.MEMORY_LAYOUT, "behaviour/odd_addresses", "bits")
class odd_addresses_rounded_down(Plain):
    """A tensor at an odd address is read from the element before it."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        if hidden_states.numel() and hidden_states.data_ptr() % 16:
            hidden_states = hidden_states.reshape(-1).roll(1).view(hidden_states.shape)
        return super()._forward(hidden_states, expert_ids, weights, save)


@mutant(Cause.MEMORY_LAYOUT, "behaviour/nothing_is_written", "written")
class input_scaled_in_place(Plain):
    """Scales the caller's hidden_states in place and does not restore the last element."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        output = super()._forward(hidden_states, expert_ids, weights, save)
        hidden_states[-1:, -1:] *= 1.5
        return output


@mutant(Cause.MEMORY_LAYOUT, "behaviour/nothing_is_written_at_odd_sizes", "written")
class padding_written_behind_the_input(Plain):
    """The last row of hidden_states is padded in place to whole blocks of 32 columns."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        end = hidden_states.storage_offset() + hidden_states.numel()
        room = hidden_states.untyped_storage().nbytes() // hidden_states.element_size() - end
        behind = min(room, -hidden_states.shape[1] % 32)
        if hidden_states.is_contiguous() and behind > 0:
            hidden_states.as_strided((behind,), (1,), end).zero_()
        return super()._forward(hidden_states, expert_ids, weights, save)


# ---- threads


@mutant(Cause.THREADS, "behaviour/threads", "bits")
class one_share_a_thread(Plain):
    """A sum is split by the number of threads, so the order of its terms depends on it."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        shares = self.spec.cpuinfer_threads
        cut = [part.contiguous() for part in a.tensor_split(shares, 1)]
        return self.sum_of_parts([x @ y for x, y in zip(cut, b.tensor_split(shares, 0), strict=True)])


@mutant(Cause.THREADS, "behaviour/repeats", "bits")
class never_the_same(Plain):
    """Sums in an order that depends on timing: one element is one unit off in every other call."""

    _calls = 0

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        output = super()._forward(hidden_states, expert_ids, weights, save)
        self._calls += 1
        if output.numel() and self._calls % 2:
            output.view(torch.int16)[0, 0] ^= 1
        return output


# ---- refusals


@mutant(Cause.REFUSAL, "tp_constraint/2049/2", "refusal")
class tp_remainder_accepted(Plain):
    """A degree that does not divide the intermediate size is accepted, and TP 1 is used."""

    def __init__(self, **arguments: Any) -> None:
        size, degree = arguments["moe_intermediate_size"], arguments.get("threadpool_count", 1)
        uneven = isinstance(degree, int) and degree > 1 and isinstance(size, int) and size % degree
        super().__init__(**{**arguments, "threadpool_count": 1 if uneven else degree})


@mutant(Cause.REFUSAL, "refusals/grad_output columns", "raised")
class refused_backward_uses_its_forward_up(Plain):
    """A refused backward consumes its forward."""

    def backward(self, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        try:
            return super().backward(grad_output)
        except (ValueError, TypeError):
            self._saved.pop()
            raise


@mutant(Cause.REFUSAL, "refusals/two forwards outstanding", "refusal")
class cache_depth_ignored(Plain):
    """Any number of forwards may be outstanding, regardless of max_cache_depth."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        super().__init__(**{**arguments, "max_cache_depth": 1 << 20})


# ---- resources


@mutant(Cause.OTHER, "processes/idle_experts_take_no_memory", "resources")
class every_expert_packed(Plain):
    """The first call packs all experts, also those without a token."""

    _packed_of: tuple[Tensor, ...] = ()

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        if self._packed_of is not self._base:
            self._base = self._packed_of = tuple(tensor.clone() for tensor in self._base)
        return super()._forward(hidden_states, expert_ids, weights, save)
