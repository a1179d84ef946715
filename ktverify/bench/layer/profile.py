"""Run a case through the native engine, range by range, and record where the time of each call went.

Ranges and their parts are NVTX ranges of the same names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ktverify.bench import ceilings
from ktverify.bench.layer.profile_record import RANGES, CallLine, CallPart, Pass, Range
from ktverify.bench.timed_run import CeilingLine, OtherLoadLine
from ktverify.engines.native.phase_times import StageTimes
from ktverify.spec.cases import Case
from ktverify.spec.names import GRAD_NAMES, LORA_NAMES
from ktverify.system.timing import Clock, OtherLoad, Timeline, nvtx_range

# size of the memory that the bandwidth is measured on, well beyond any cache
READ_BYTES = 1 << 28
FORWARD, BACKWARD, OPTIMIZER, UPDATE = "forward", "backward", "AdamW step", "update_lora_weights"
# reading the engine's stage times, between the parts of a step
READING = "reading the record"


@dataclass(frozen=True)
class ProfileSettings:
    """isa: None for the best; threads: None for all; warmup: calls of each range that do not count; repeats: plain and
    recorded calls of each range, in turn."""

    isa: str | None = None
    tp: int = 1
    threads: int | None = None
    warmup: int = 3
    repeats: int = 15
    read_bytes: int = READ_BYTES


class Profiler:
    """Measures the three ranges of one case, each with a new layer, so that each has a first call."""

    def __init__(self, case: Case, settings: ProfileSettings) -> None:
        from ktverify.spec.inputs import make_inputs

        self.case, self.settings = case, settings
        self.inputs = make_inputs(case)
        self.clock = Clock()
        self.began = time.perf_counter_ns()
        self.layer: Any = self._fresh_layer()
        self.optimizer: Any = None
        self.about: dict[str, Any] = {"isa": self.layer.isa, "workers": self.layer.threads}

    def lines(self) -> Iterator[CallLine | CeilingLine | OtherLoadLine]:
        """All calls of all ranges: the first, the warm-up, then plain and recorded calls in turn."""
        load = OtherLoad()
        s = self.settings
        warmups: list[Pass] = ["warmup"] * s.warmup
        steady: list[Pass] = ["plain", "recorded"]
        for name in RANGES:
            yield self._ceilings()
            self.layer = self._fresh_layer()
            self.optimizer = self._optimizer()
            for which in ("first", *warmups, *steady * s.repeats):
                yield self._call(name, which)
        yield self._ceilings()
        yield OtherLoadLine(others=load.share())

    def steps(self) -> int:
        """The number of lines that `lines` yields."""
        return len(RANGES) * (2 + self.settings.warmup + 2 * self.settings.repeats) + 2

    def _ceilings(self) -> CeilingLine:
        found = ceilings.measure(self.about["workers"], self.about["isa"], self.settings.read_bytes)
        return CeilingLine(read=float(found["read"]), multiply=float(found["multiply"]))

    def _fresh_layer(self) -> Any:
        from ktverify.engines.native.layer import KTMoEWrapper
        from ktverify.engines.run import build_layer

        s = self.settings
        return build_layer(KTMoEWrapper, self.case, self.inputs, isa=s.isa, tp=s.tp, threads=s.threads)

    def _optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW([getattr(self.layer, name) for name in LORA_NAMES], lr=1e-4)

    def _call(self, name: Range, which: Pass) -> CallLine:
        """Time one call of range `name`. Only a training step has several parts, and time of its own around them."""
        recorded = which in ("first", "recorded")
        self.layer.record_stages(recorded)
        if name == "backward_only":
            self._forward()
        with nvtx_range(name):
            parts = Timeline()
            at = parts.began - self.began
            if name == "full_train_loop":
                ns, stages = self._timed_step(parts, recorded=recorded)
                at = parts.began - self.began
            elif name == "forward_only":
                parts.measure(FORWARD, lambda: self._forward(save=False))
            else:
                parts.measure(BACKWARD, lambda: self.layer.backward(self.inputs.grad_output))
        if name != "full_train_loop":
            stages = {parts.calls[0].name: self.layer.stage_times()} if recorded else {}
            # the only part is the call; the time around it is the profiler's own
            ns, at = parts.calls[0].ns, at + parts.calls[0].at
            parts.calls[0] = replace(parts.calls[0], at=0)
        found = [CallPart(name=p.name, at=p.at, ns=p.ns, stages=stages.get(p.name)) for p in parts.calls]
        return CallLine(range=name, which=which, at=at, ns=ns, parts=tuple(found))

    def _forward(self, *, save: bool = True) -> None:
        i = self.inputs
        self.layer.forward_sft(i.hidden_states, i.expert_ids, i.weights, save_for_backward=save)

    def _timed_step(self, parts: Timeline, *, recorded: bool) -> tuple[int, dict[str, StageTimes]]:
        """Time one training step: nanoseconds, and the stages of its engine calls."""
        stages: dict[str, StageTimes] = {}

        def step() -> None:
            parts.restart()  # within the step's time, so that no part ends after it
            for name, call in ((FORWARD, self._forward), (BACKWARD, self._backward)):
                parts.measure(name, call)
                if recorded:
                    stages[name] = parts.measure(READING, self.layer.stage_times)
            parts.measure(OPTIMIZER, self.optimizer.step)
            parts.measure(UPDATE, self.layer.update_lora_weights)

        return self.clock.time(step), stages

    def _backward(self) -> None:
        _, grads = self.layer.backward(self.inputs.grad_output)
        for parameter, grad in zip(LORA_NAMES, GRAD_NAMES, strict=True):
            getattr(self.layer, parameter).grad = grads[grad]
