"""The time that the MoE layers of a training step take: rooflines, what the engine reaches of them, and traffic.

docs/plan.md has the formulas by the names of the functions here. Forward and backward; sums over layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ktverify.bench.plan.hardware import Hardware
from ktverify.bench.plan.memory import BF16, FP32, Load, layer_use
from ktverify.bench.plan.splits import Split
from ktverify.bench.shapes import backward_work, forward_work, weight_bytes
from ktverify.engines.expert_parallel import bounds_of
from ktverify.spec.names import lora_shapes
from ktverify.system.plausible import Work
from ktverify.training.gpu_experts import most_frequent
from ktverify.training.moe_model import MoeModel

DIRECTIONS = {"forward": forward_work, "backward": backward_work}


@dataclass(frozen=True)
class Efficiency:
    """The roofline's time over the engine's, by direction: (rows of a reached expert, share) in ascending order.

    Without points, the share is 1: times are lower bounds."""

    points: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    def share(self, direction: str, rows: float) -> float:
        """Linear in the logarithm of the rows between two points; beyond the last ones, theirs."""
        points = self.points.get(direction, ((1.0, 1.0),))
        for (left, low), (right, high) in itertools.pairwise(points):
            if left <= rows < right:  # two points may have the same rows
                return low + (high - low) * math.log(rows / left) / math.log(right / left)
        return points[0][1] if rows < points[0][0] else points[-1][1]


@dataclass(frozen=True)
class Routing:
    """How likely a slot goes to each expert: (probabilities [E], for so many layers)."""

    layers: Sequence[tuple[Sequence[float], int]]

    @classmethod
    def even(cls, model: MoeModel) -> Routing:
        """All experts are equally likely."""
        return cls([([1 / model.experts] * model.experts, model.layers)])

    @classmethod
    def of_counts(cls, model: MoeModel, counts: Sequence[Sequence[int]], where: str) -> Routing:
        """As often as `expert-stats` counted. ValueError where the counts are of another model."""
        if len(counts) != model.layers or any(len(each) != model.experts for each in counts):
            raise ValueError(
                f"{where} counts {len(counts)} layers of {sorted({len(each) for each in counts})} experts; this model "
                f"has {model.layers} layers of {model.experts}"
            )
        return cls([([count / max(1, sum(each)) for count in each], 1) for each in counts])


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. compute: of the slowest process; traffic: of the exchange of rows, which nothing hides;
    gpu: of the GPU meanwhile. sent: bytes that one process gives to others."""

    compute: float
    traffic: float = 0.0
    gpu: float = 0.0
    sent: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute, self.gpu) + self.traffic


def reached(chances: Sequence[float], top_k: int, tokens: float) -> float:
    """How many of these experts get a row: Σ 1 - (1 - k p)^T, where a slot goes to an expert with probability p."""
    return float(sum(1 - (1 - min(1.0, top_k * chance)) ** tokens for chance in chances))


def traffic_bytes(tokens: float, top_k: int, hidden: int) -> float:
    """What crosses between processes in one layer and step: 4 T k H 2. A row of bf16 for each slot, there and back,
    forward and backward. Rows for experts of their own process are counted as well."""
    return 4 * tokens * top_k * hidden * BF16


def step_time(
    model: MoeModel, split: Split, hardware: Hardware, load: Load, routing: Routing, efficiency: Efficiency
) -> StepTime:
    """The time of a step of `load.tokens` tokens."""
    own = split.of_a_process(hardware)
    use = layer_use(model, split, load)
    if split.gpu_experts:
        return _hybrid(model, split, own, load, routing, efficiency, use.expert)
    compute = 0.0
    for chances, times in routing.layers:
        parts = [chances[first:end] for first, end in itertools.pairwise(bounds_of(model.experts, split.ranks))]
        compute += times * max(_engine(model, part, own, load, efficiency, use.expert) for part in parts)
    if split.ranks == 1:
        return StepTime(compute)
    # of one process: the rows for all others, for those of its machine, and for those of other machines
    rows = model.layers * traffic_bytes(load.tokens / split.ranks, model.top_k, model.hidden)
    here = split.on_a_machine(hardware)
    inside, outside = rows * (here - 1) / split.ranks, rows * (split.ranks - here) / split.ranks
    seconds = inside / hardware.local + outside * here / hardware.network
    return StepTime(compute, seconds, sent=inside + outside)


def _engine(
    model: MoeModel, chances: Sequence[float], own: Hardware, load: Load, efficiency: Efficiency, expert_bytes: float
) -> float:
    """Seconds of one layer: the slots of these experts, whose weights take `expert_bytes` each."""
    active = reached(chances, model.top_k, load.tokens)
    if active == 0:
        return 0.0
    rows = load.tokens * model.top_k * sum(chances) / active
    works = works_of(model, load, active * expert_bytes, sum(chances))
    return sum(
        work.seconds(own.bandwidth, own.peak) / efficiency.share(direction, rows) for direction, work in works.items()
    )


def works_of(model: MoeModel, load: Load, read: float, share: float = 1.0) -> dict[str, Work]:
    """The work of a layer by direction, for `share` of its slots, which read so many bytes of weights."""
    case = load.case(model)
    return {direction: Work(read, work(case, 0).flops * share) for direction, work in DIRECTIONS.items()}


def _hybrid(
    model: MoeModel,
    split: Split,
    own: Hardware,
    load: Load,
    routing: Routing,
    efficiency: Efficiency,
    expert_bytes: float,
) -> StepTime:
    """The most likely experts are on the GPU. It computes meanwhile, at its roofline; copies are not hidden from it."""
    case = load.case(model)
    h, n = model.hidden, split.gpu_experts
    lora = sum(math.prod(shape) for shape in lora_shapes(n, h, model.intermediate, load.rank).values())
    # x and grad_output there; output and grad_input back in fp32; LoRA there, its gradients back
    copied = load.tokens * h * 2 * (BF16 + FP32) + 2 * BF16 * lora
    engine = gpu = 0.0
    for chances, times in routing.layers:
        there = set(most_frequent(chances, n))
        on_gpu = [chances[expert] for expert in there]
        rest = [chance for expert, chance in enumerate(chances) if expert not in there]
        engine += times * _engine(model, rest, own, load, efficiency, expert_bytes)
        read = reached(on_gpu, model.top_k, load.tokens) * weight_bytes(case, 1)
        for work in works_of(model, load, read, sum(on_gpu)).values():
            gpu += times * work.seconds(own.gpu_bandwidth, own.gpu_peak)
        gpu += times * copied / own.gpu_link
    return StepTime(engine, gpu=gpu)
