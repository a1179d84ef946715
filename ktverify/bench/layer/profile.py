"""Runs a case through the native engine, range by range, and keeps where each call's time went.

Comes in: a case and settings. Goes out: lines, as they are made. Ranges and their parts carry their names to NVTX.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ktverify.bench import ceilings
from ktverify.bench.layer.profile_record import RANGES, CallLine, CeilingLine, Part, Pass, Range
from ktverify.bench.measured import QuietLine
from ktverify.bench.other_load import Neighbours
from ktverify.bench.ranges import nvtx_range
from ktverify.spec.cases import Case
from ktverify.spec.names import GRAD_NAMES, LORA_NAMES
from ktverify.system.clock import Clock

# what the bandwidth is measured on, well beyond any cache
READ_BYTES = 1 << 28
FORWARD, BACKWARD, OPTIMIZER, UPDATE = "forward", "backward", "AdamW step", "update_lora_weights"
# asking the engine for its stages, between the parts of a step
READING = "reading the record"


@dataclass(frozen=True)
class Settings:
    """isa: None for the best; threads: None for all; warmup: calls that don't count; repeats: of each range that do,
    recorded and plain in turn."""

    isa: str | None = None
    tp: int = 1
    threads: int | None = None
    warmup: int = 3
    repeats: int = 15
    read_bytes: int = READ_BYTES


class Parts:
    """The parts of one call, timed one after the other."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.found: list[Part] = []
        self.began = time.perf_counter_ns()

    def time(self, name: str, call: Callable[[], object]) -> None:
        at = time.perf_counter_ns() - self.began
        with nvtx_range(name):
            ns = self.clock.time(call)
        self.found.append(Part(name=name, at=at, ns=ns))

    def explain(self, layer: Any) -> None:
        """The last part was an engine call that was recorded."""
        self.found[-1] = self.found[-1].model_copy(update={"stages": layer.stage_times()})


class Profiler:
    """The layer of one case and its three ranges. Each gets a layer of its own, so that each has a first call."""

    def __init__(self, case: Case, settings: Settings) -> None:
        from ktverify.spec.inputs import make_inputs

        self.case, self.settings = case, settings
        self.inputs = make_inputs(case)
        self.clock = Clock()
        self.began = time.perf_counter_ns()
        self.layer: Any = self._fresh_layer()
        self.optimizer: Any = None
        self.about: dict[str, Any] = {"isa": self.layer.isa, "workers": self.layer.threads}

    def lines(self) -> Iterator[CallLine | CeilingLine | QuietLine]:
        """All calls of all ranges: the first, the warm-up, then plain and recorded ones in turn."""
        neighbours = Neighbours(list)
        before = neighbours.read()
        for name in RANGES:
            yield self._ceilings()
            self.layer = self._fresh_layer()
            self.optimizer = self._optimizer()
            yield self._call(name, "first")
            for _ in range(self.settings.warmup):
                yield self._call(name, "warmup")
            for _ in range(self.settings.repeats):
                yield self._call(name, "plain")
                yield self._call(name, "recorded")
        yield self._ceilings()
        yield QuietLine(others=before.share_until(neighbours.read()))

    def steps(self) -> int:
        """How many lines there will be."""
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
        recorded = which in ("first", "recorded")
        self.layer.record_stages(recorded)
        if name == "backward_only":
            self._forward()
        with nvtx_range(name):
            parts = Parts(self.clock)
            at = parts.began - self.began
            if name == "full_train_loop":
                ns = self.clock.time(lambda: self._step(parts, recorded))
                at = parts.began - self.began
                return CallLine(range=name, which=which, at=at, ns=ns, parts=tuple(parts.found))
            if name == "forward_only":
                parts.time(FORWARD, lambda: self._forward(save=False))
            else:
                parts.time(BACKWARD, lambda: self.layer.backward(self.inputs.grad_output))
        if recorded:
            parts.explain(self.layer)
        # the only part is the call: what lies around it is the profiler's own
        only = parts.found[0]
        return CallLine(
            range=name, which=which, at=at + only.at, ns=only.ns, parts=(only.model_copy(update={"at": 0}),)
        )

    def _forward(self, *, save: bool = True) -> None:
        i = self.inputs
        self.layer.forward_sft(i.hidden_states, i.expert_ids, i.weights, save_for_backward=save)

    def _step(self, parts: Parts, recorded: bool) -> None:
        """One training step: forward, backward, optimizer, update."""
        parts.began = time.perf_counter_ns()  # within the call's time, so that no part ends behind it
        parts.time(FORWARD, self._forward)
        self._explain(parts, recorded)
        parts.time(BACKWARD, self._backward)
        self._explain(parts, recorded)
        parts.time(OPTIMIZER, self.optimizer.step)
        parts.time(UPDATE, self.layer.update_lora_weights)

    def _explain(self, parts: Parts, recorded: bool) -> None:
        if recorded:
            parts.time(READING, lambda: parts.explain(self.layer))

    def _backward(self) -> None:
        _, grads = self.layer.backward(self.inputs.grad_output)
        for parameter, grad in zip(LORA_NAMES, GRAD_NAMES, strict=True):
            getattr(self.layer, parameter).grad = grads[grad]
