"""Mutants of arguments: what the constructor and the calls are given, and do not heed."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.mutants.base import Gradients, Group, Plain, mutant
from ktverify.system.limits import processors


@mutant(Cause.OTHER, "behaviour/largest_call", "raised")
class largest_call_refused(Plain):
    """A call of chunked_prefill_size tokens is refused: the limit is one too low."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        if len(hidden_states) >= self.spec.chunked_prefill_size:
            raise ValueError(f"{len(hidden_states)} tokens, chunked_prefill_size {self.spec.chunked_prefill_size}")
        return super()._forward(hidden_states, expert_ids, weights, save)


@mutant(Cause.OTHER, "behaviour/layer_index", "bits")
class lora_in_the_first_layer_only(Plain):
    """Layers with a layer_idx above 0 have no LoRA."""

    def scale(self) -> float:
        return super().scale() if self.layer_idx == 0 else 0.0


@mutant(Cause.ORDER, "behaviour/saved_by_default", "raised")
class not_saved_by_default(Plain):
    """save_for_backward is False where it is not given."""

    def forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = False
    ) -> Tensor:
        return super().forward_sft(hidden_states, expert_ids, weights, save_for_backward)


@mutant(Cause.THREADS, "behaviour/threads_fewer_than_parts", "bits")
class parts_without_a_thread_left_out(Plain):
    """Each tensor-parallel part needs a thread of its own: with fewer threads, the last parts are not computed."""

    def sum_of_parts(self, parts: list[Tensor]) -> Tensor:
        return super().sum_of_parts(parts[: self.spec.cpuinfer_threads])


@mutant(Cause.STALE_LORA, "behaviour/lora_again", "bits")
class lora_taken_once(Plain):
    """A second init_lora_weights exchanges the parameters, and computes with the first ones until an update."""

    def init_lora_weights(self, *given: Any, **named: Any) -> None:
        before = self._lora
        super().init_lora_weights(*given, **named)
        self._lora = before or self._lora


@mutant(Cause.REFUSAL, "refusals/num_gpu_experts -1", "refusal")
class gpu_experts_ignored(Plain):
    """num_gpu_experts has no effect, and any number is accepted."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "num_gpu_experts": 0})


@mutant(Cause.THREADS, "processes/threads_have_a_ceiling", "resources")
class one_thread_more_than_processors(Plain):
    """One thread more than there are processors, whatever cpuinfer_threads says."""

    _end: ClassVar[threading.Event] = threading.Event()

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # those of the layer before end, so that many layers do not fill the machine
        type(self)._end.set()
        type(self)._end = threading.Event()
        for _ in range(processors() + 1):
            threading.Thread(target=self._end.wait, daemon=True).start()


@mutant(Cause.OTHER, "processes/cleared_memory_comes_back", "resources")
class buffers_kept_after_clearing(Plain):
    """clear_sft_buffer_cache leaves the largest buffer of every kind where it is."""

    _buffers: ClassVar[dict[str, Tensor]] = {}

    def backward_of(self, at: Group, d_out: Tensor) -> tuple[Tensor, Gradients]:
        for name in ("g", "u", "h"):
            if len(at.rows) * self.spec.moe_intermediate_size > self._buffers.get(name, at.rows[:0]).numel():
                self._buffers[name] = getattr(at, name).clone()
        return super().backward_of(at, d_out)
