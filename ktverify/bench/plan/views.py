"""A plan as tables, and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ktverify.bench.plan.measure import MeasuredStep
from ktverify.bench.plan.plan import FORMATS, Planned, SplitPlan
from ktverify.bench.timed_run import busy
from ktverify.report.grid import Grid

GIB = 1 << 30


def grids(planned: Planned) -> list[Grid]:
    """The splits, the memory of a process, and all base formats."""
    return [_splits(planned), _memory(planned), _formats(planned)]


def _splits(planned: Planned) -> Grid:
    load, model = planned.load, planned.model
    rows = []
    for one in planned.chosen:
        row = {"split": one.split.name, "processes": str(one.split.ranks)}
        if one.memory is None or one.time is None:
            rows.append(row | dict.fromkeys(_numbers(planned), "") | {"fits": f"not possible: {one.why_not}"})
            continue
        times = (one.time.compute, one.time.traffic, one.time.gpu, one.time.seconds)
        numbers = (one.memory.total / GIB, one.node / GIB, one.machine / GIB, one.gpu / GIB, one.time.sent / 1e9)
        cells = [*(f"{number:,.1f}" for number in (*numbers, *(1e3 * time for time in times)))]
        both = zip(_every, [*cells, f"{one.tokens_per_s:,.0f}"], strict=True)
        wanted = _numbers(planned)
        rows.append(row | {name: cell for name, cell in both if name in wanted} | {"fits": "yes" if one.fits else "no"})
    bound = "as measured here" if planned.measured else "lower bounds: --measure finds what the engine reaches of them"
    notes = (
        f"{model.family}: {model.layers} MoE layers, E={model.experts}, k={model.top_k}, H={model.hidden}, "
        f"I={model.intermediate}; {load.tokens} tokens a step, LoRA rank {load.rank}",
        f"times of forward and backward of the MoE layers, {bound}",
    )
    return Grid.of(rows, f"splits, base weights in {load.format}", notes=notes, left=("fits",))


_every = (
    "GiB a process", "GiB a node", "GiB a machine", "GiB on the GPU", "GB sent", "engine ms", "traffic ms", "GPU ms",
    "step ms", "tokens/s",
)  # fmt: skip


def _numbers(planned: Planned) -> list[str]:
    """The columns that say anything for these machines."""
    hardware = planned.hardware
    several = hardware.machines * hardware.nodes > 1
    left_out = {"GiB on the GPU", "GPU ms"} if not hardware.gpu_memory else set()
    left_out |= set() if several else {"GB sent", "traffic ms"}
    left_out |= set() if hardware.nodes > 1 else {"GiB a node"}
    return [name for name in _every if name not in left_out]


def _memory(planned: Planned) -> Grid:
    rows = []
    for one in planned.chosen:
        if one.memory is not None:
            parts = {name.replace("_", " "): value for name, value in asdict(one.memory).items() if name != "gpu"}
            cells = {name: f"{value / GIB:,.2f}" for name, value in (parts | {"all": one.memory.total}).items()}
            rows.append({"split": one.split.name} | cells)
    return Grid.of(rows, f"memory of the largest process, GiB, base weights in {planned.load.format}")


def _formats(planned: Planned) -> Grid:
    rows = []
    for at, one in enumerate(planned.chosen):
        cells = {format: _machine(planned.splits[format][at]) for format in FORMATS}
        rows.append({"split": one.split.name.partition(",")[0] if one.split.gpu_experts else one.split.name} | cells)
    return Grid.of(rows, f"GiB a machine, of {planned.hardware.memory / GIB:,.1f}; in brackets: does not fit")


def _machine(one: SplitPlan) -> str:
    if one.memory is None:
        return "-"
    text = f"{one.machine / GIB:,.1f}"
    return text if one.fits else f"({text})"


def calibration(measured: MeasuredStep) -> Grid:
    """The efficiencies that a plan with --measure uses."""
    points = measured.efficiency.points
    rows = [
        {"rows an expert": f"{rows:.1f}"} | {name: f"{100 * dict(found)[rows]:.0f} %" for name, found in points.items()}
        for rows, _ in points["forward"]
    ]
    limits = f"of the roofline with {measured.read / 1e9:.1f} GB/s and {measured.multiply / 1e9:.0f} GFLOP/s"
    notes = tuple(filter(None, (busy([measured.others]), limits)))
    return Grid.of(rows, f"what the engine reaches, base weights in {measured.request.format}", notes=notes)


def as_json(planned: Planned, measured: MeasuredStep | None, sources: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One object. Bytes, seconds, and bytes or operations per second."""
    model = asdict(planned.model)
    del model["attention"]
    splits = {
        format: [asdict(one) | {"tokens_per_s": one.tokens_per_s} for one in plans]
        for format, plans in planned.splits.items()
    }
    best = planned.fastest
    found: dict[str, Any] = {
        "kind": "plan",
        "verdict": planned.verdict,
        "fastest": best.split.name if best else None,
        "model": model,
        "hardware": asdict(planned.hardware),
        "inputs": dict(sources),
        "load": asdict(planned.load),
        "splits": splits,
    }
    if measured is not None:
        found["measured"] = {
            "request": measured.request.model_dump(),
            "efficiency": measured.efficiency.points,
            "predicted_s": measured.predicted,
            "roofline_s": measured.bound,
            "measured_s": measured.seconds,
            "passed": measured.passed,
        }
    return found
