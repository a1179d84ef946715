"""Runs a case through the native engine, range by range, and keeps where each call's time went.

Comes in: a case and settings. Goes out: lines, as they are made. Ranges carry their names to NVTX as well, where the
nvtx package is installed (`nsys profile --trace=nvtx`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ktverify.bench.clock import Clock
from ktverify.cases import Case
from ktverify.names import GRAD_NAMES, LORA_NAMES
from ktverify.profile.record import RANGES, CallLine, Pass, Range
from ktverify.stages import StageTimes


@dataclass(frozen=True)
class Settings:
    """isa: None for the best; threads: None for all; warmup: calls that don't count; repeats: of each range that do,
    recorded and plain in turn."""

    isa: str | None = None
    tp: int = 1
    threads: int | None = None
    warmup: int = 3
    repeats: int = 15


def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """A range of this name for Nsight, or nothing without the nvtx package."""
    if importlib.util.find_spec("nvtx") is None:
        return contextlib.nullcontext()
    import nvtx

    found: AbstractContextManager[Any] = nvtx.annotate(name)
    return found


class Profiler:
    """The layer of one case and its three ranges. Each gets a layer of its own, so that each has a first call."""

    def __init__(self, case: Case, settings: Settings) -> None:
        from ktverify.data import make_inputs

        self.case, self.settings = case, settings
        self.inputs = make_inputs(case)
        self.clock = Clock()
        self.began = time.perf_counter_ns()
        self.layer: Any = None
        self.optimizer: Any = None

    def about(self) -> dict[str, Any]:
        """isa and workers that the layers have."""
        layer = self._fresh_layer()
        return {"isa": layer.isa, "workers": layer.threads}

    def lines(self) -> Iterator[CallLine]:
        """All calls of all ranges; the first three passes before the steady ones."""
        for name in RANGES:
            self.layer = self._fresh_layer()
            self.optimizer = self._optimizer()
            yield self._call(name, "first")
            for _ in range(self.settings.warmup):
                yield self._call(name, "warmup")
            for _ in range(self.settings.repeats):
                yield self._call(name, "plain")
                yield self._call(name, "recorded")

    def calls(self) -> int:
        """How many lines there will be."""
        return len(RANGES) * (1 + self.settings.warmup + 2 * self.settings.repeats)

    def _fresh_layer(self) -> Any:
        from ktverify.experts import KTMoEWrapper
        from ktverify.running import build_layer

        s = self.settings
        return build_layer(KTMoEWrapper, self.case, self.inputs, isa=s.isa, tp=s.tp, threads=s.threads)

    def _optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW([getattr(self.layer, name) for name in LORA_NAMES], lr=1e-4)

    def _call(self, name: Range, which: Pass) -> CallLine:
        recorded = which in ("first", "recorded")
        self.layer.record_stages(recorded)
        stages: list[StageTimes] = []

        def keep() -> None:
            if recorded:
                stages.append(self.layer.stage_times())

        call = self._prepared(name, keep if name == "full_train_loop" else lambda: None)
        at = time.perf_counter_ns() - self.began
        with nvtx_range(name):
            ns = self.clock.time(call)
        if name != "full_train_loop":
            keep()
        return CallLine(range=name, which=which, at=at, ns=ns, stages=tuple(stages))

    def _prepared(self, name: Range, keep: Callable[[], None]) -> Callable[[], object]:
        """What is timed; what must stand before it is done here. keep: after each of the step's engine calls."""
        i, layer = self.inputs, self.layer
        if name == "forward_only":
            return lambda: layer.forward_sft(i.hidden_states, i.expert_ids, i.weights, save_for_backward=False)
        if name == "backward_only":
            layer.forward_sft(i.hidden_states, i.expert_ids, i.weights)
            return lambda: layer.backward(i.grad_output)

        def step() -> None:
            layer.forward_sft(i.hidden_states, i.expert_ids, i.weights)
            keep()
            _, grads = layer.backward(i.grad_output)
            keep()
            for parameter, grad in zip(LORA_NAMES, GRAD_NAMES, strict=True):
                getattr(layer, parameter).grad = grads[grad]
            self.optimizer.step()
            layer.update_lora_weights()

        return step
