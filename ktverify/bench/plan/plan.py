"""Every split of a model, in every base format: what it takes, how long a step is, whether it fits; and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktverify.bench.plan.hardware import Hardware
from ktverify.bench.plan.memory import METHOD_OF, Load, ProcessMemory, process_memory
from ktverify.bench.plan.splits import Split, splits_of
from ktverify.bench.plan.steps import Efficiency, Routing, StepTime, step_time
from ktverify.errors import one_line
from ktverify.system.limits import format_bytes
from ktverify.training.moe_model import MoeModel

FORMATS = tuple(METHOD_OF)


@dataclass(frozen=True)
class SplitPlan:
    """One split in one base format. why_not: why the model's sizes do not allow it, "" where they do; memory: of the
    largest process; node, machine, gpu: bytes that a NUMA node, a machine, its GPU needs to have; fits: they have."""

    split: Split
    load: Load
    why_not: str = ""
    memory: ProcessMemory | None = None
    time: StepTime | None = None
    node: float = 0.0
    machine: float = 0.0
    gpu: float = 0.0
    fits: bool = False

    @property
    def tokens_per_s(self) -> float:
        """Of the MoE layers alone; 0 for a split that is not possible."""
        return self.load.tokens / self.time.seconds if self.time else 0.0


@dataclass(frozen=True)
class Planned:
    """All splits by base format. format: the one that the verdict is about."""

    model: MoeModel
    hardware: Hardware
    load: Load
    splits: dict[str, list[SplitPlan]]
    measured: bool

    @property
    def chosen(self) -> list[SplitPlan]:
        return self.splits[self.load.format]

    @property
    def fastest(self) -> SplitPlan | None:
        """Of the splits that fit, in the chosen format."""
        return max((one for one in self.chosen if one.fits), key=lambda one: one.tokens_per_s, default=None)

    @property
    def verdict(self) -> str:
        best, format = self.fastest, self.load.format
        if best is not None:
            bound = "" if self.measured else "at most "
            fitting = sum(one.fits for one in self.chosen)
            return (
                f"{format}: {best.split.name} is the fastest of {fitting} that fit, of {len(self.chosen)}: "
                f"{bound}{best.tokens_per_s:,.0f} tokens/s in the MoE layers, {format_bytes(best.machine)} a machine"
            )
        possible = [one for one in self.chosen if not one.why_not]
        if not possible:
            return f"{format}: no split is possible: {self.chosen[0].why_not}"
        least = min(possible, key=lambda one: one.machine)
        others = [other for other, plans in self.splits.items() if any(one.fits for one in plans)]
        return (
            f"{format}: no split fits; {least.split.name} takes least, {format_bytes(least.machine)} a machine of "
            f"{format_bytes(self.hardware.memory)}; formats that fit: {', '.join(others) or 'none'}"
        )


def plan(
    model: MoeModel,
    hardware: Hardware,
    load: Load,
    *,
    routing: Routing | None = None,
    efficiency: Efficiency | None = None,
    gpu_experts: int | None = None,
) -> Planned:
    """All splits in all base formats. routing: even by default; efficiency: measured of load's format, for that format
    alone. gpu_experts: None for as many as make the step shortest, of those that fit. ValueError for sizes of no layer.
    """
    load.case(model)
    if gpu_experts is not None and not hardware.gpu_memory:
        raise ValueError("--gpu-experts is given, and no GPU: give --gpu-memory as well")
    found = {}
    for format in FORMATS:
        each = Load(load.tokens, load.rank, format)
        share = efficiency if efficiency is not None and format == load.format else Efficiency()
        parts = (model, hardware, each, routing or Routing.even(model), share)
        found[format] = [_planned(split, *parts) for split in splits_of(hardware)]
        if hardware.gpu_memory:
            found[format][-1] = _hybrid(gpu_experts, *parts)
    return Planned(model, hardware, load, found, efficiency is not None)


def _planned(
    split: Split, model: MoeModel, hardware: Hardware, load: Load, routing: Routing, efficiency: Efficiency
) -> SplitPlan:
    try:
        memory = process_memory(model, split, load, gpu=hardware.gpu_memory > 0)
    except (ValueError, RuntimeError) as error:
        return SplitPlan(split, load, one_line(error))
    time = step_time(model, split, hardware, load, routing, efficiency)
    here = split.on_a_machine(hardware)
    node, machine, gpu = memory.total / split.parts, here * memory.total, here * memory.gpu
    fits = machine <= hardware.memory and node <= hardware.memory / hardware.nodes and gpu <= hardware.gpu_memory
    return SplitPlan(split, load, "", memory, time, node, machine, gpu, fits)


def _hybrid(number: int | None, model: MoeModel, hardware: Hardware, *parts: object) -> SplitPlan:
    """The hybrid split with `number` experts of each layer on the GPU; None: that of the shortest step that fits."""
    if number is not None and not 1 <= number <= model.experts:
        raise ValueError(f"--gpu-experts is {number}; it takes 1 to {model.experts}, the experts of a layer")

    def of(experts: int) -> SplitPlan:
        return _planned(splits_of(hardware, experts)[-1], model, hardware, *parts)  # type: ignore[arg-type]

    if number is not None:
        return of(number)
    tried: Sequence[SplitPlan] = [of(experts) for experts in _numbers(model.experts)]
    fitting = [one for one in tried if one.fits]
    return max(fitting, key=lambda one: one.tokens_per_s) if fitting else tried[0]


def _numbers(experts: int) -> list[int]:
    """Every number of experts of a small layer, and about a hundred of a large one."""
    step = -(-experts // 100)
    return sorted({1, *range(step, experts + 1, step), experts})
