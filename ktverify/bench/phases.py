"""The native engine's phases as rows of a table: times, shares, and rates beside the machine's ceilings."""

from __future__ import annotations

from ktverify.engines.native.phase_times import StageTimes
from ktverify.report.numbers import NOTHING, many, number, percent

# the phases' names on pages; ktverify/engines/native/phase_times.py has the engine's own
PHASES = {
    "routing": "routing",
    "allocation": "buffers",
    "pack_weights": "pack weights",
    "pack_input": "pack input",
    "gate_up_lora_a": "gate, up: x A",
    "gate_up": "gate + up (+ LoRA B)",
    "activation": "activation",
    "down_lora_a": "down: h A",
    "down": "down (+ LoRA B)",
    "merge": "merge",
    "scatter": "scatter",
    "down_lora_b": "down: dO B",
    "down_grad": "down grad (+ LoRA A)",
    "activation_grad": "activation grad",
    "gate_up_lora_b": "gate, up: dg B, du B",
    "gate_up_grad": "gate + up grad (+ LoRA A)",
    "gate_up_lora_grad": "gate, up LoRA grads",
    "down_lora_grad": "down LoRA grads",
    "routing_grad": "routing grad",
    "wait": "waiting",
}
STAGE_HEADINGS = ("phase", "ms", "share", "GFLOP/s", "of ceiling", "GB/s", "of ceiling")


def stage_note(times: StageTimes) -> str:
    """The number of parallel stages, and how busy the idlest and the busiest worker are."""
    shares = [times.busy_ns(worker) / times.wall_ns for worker in range(times.workers)]
    busy = f"busy {percent(min(shares), 0)} to {percent(max(shares), 0)}"
    return f"{many(times.stages, 'parallel stage')}, {many(times.workers, 'worker')}, {busy}"


def stage_rows(times: StageTimes, multiply: float, read: float) -> list[tuple[str, ...]]:
    """A row of STAGE_HEADINGS for each phase, and one for all. multiply, read: ceilings per second, 0 if not known."""

    def rate(amount: float, ns: float, ceiling: float) -> tuple[str, str]:
        # operations and bytes per ns are GFLOP/s and GB/s
        if amount == 0 or ns == 0:
            return NOTHING, NOTHING
        return number(amount / ns), percent(1e9 * amount / ns / ceiling, 0) if ceiling else NOTHING

    works = [(PHASES[phase.name], phase.wall_ns, phase.flops, phase.bytes) for phase in times.phases]
    works.append(("all", times.wall_ns, sum(work[2] for work in works), sum(work[3] for work in works)))
    return [
        (name, number(ns / 1e6), percent(ns / times.wall_ns), *rate(flops, ns, multiply), *rate(bytes_, ns, read))
        for name, ns, flops, bytes_ in works
    ]
