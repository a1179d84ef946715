"""Time what a plan predicts: `python -m ktverify.bench.plan.measure REQUEST` prints lines of JSON.

Each round times forward and backward of one layer with few experts of the model's size at several numbers of tokens,
which gives the efficiencies, and of layers as the model has them, which the prediction is compared with. Before every
call the caches are filled with other data: the weights of a whole model do not fit there. Tokens choose their experts
at random, so that the efficiencies contain what uneven numbers of rows cost.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

from ktverify.bench.plan.hardware import Hardware
from ktverify.bench.plan.memory import METHOD_OF, Load, layer_use
from ktverify.bench.plan.splits import Split
from ktverify.bench.plan.steps import DIRECTIONS, Efficiency, Routing, step_time, works_of
from ktverify.bench.timed_run import CeilingLine, lines_of_processes
from ktverify.engines.argument_checks import LayerSpec
from ktverify.runs.jsonl import JsonLine
from ktverify.system.limits import processors
from ktverify.training.moe_model import MoeModel

# of the layer that is calibrated with: experts, experts a token, and tokens of its calls, for 1 to 128 rows an expert.
# One of many experts a token makes their rows as uneven as in a large layer
EXPERTS, TOP_K, TOKENS = 8, 1, (1, 8, 32, 64, 128, 256, 512, 1024)

_OTHER_DATA = 192 << 20  # bytes
# the most that the model's layers may weigh, and multiply in a forward: seconds, not minutes
_MOST_BYTES, _MOST_FLOPS = 1 << 30, 2e10
_MOST_CALIBRATION_FLOPS = 5e10  # of its largest forward
WITHIN = 0.2


class PlanRequest(BaseModel):
    """The sizes of the model's layers, which may be fewer and smaller than the model's, and how to measure."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    tokens: int
    rank: int
    format: str
    rounds: int
    warmup: int = 3


class Sample(JsonLine):
    """One call. layer: of the model's, -1 for the calibration's; active: the experts that its tokens reach."""

    kind: Literal["call"] = "call"
    layer: int
    tokens: int
    active: int
    direction: str
    ns: int


class PlanCeilingLine(CeilingLine):
    """The machine's ceilings in one round; others: the share of the processors that other programs had in it."""

    others: float


@dataclass(frozen=True)
class MeasuredStep:
    """What `measured` found. predicted, seconds: of a step of the MoE layers in `request`; each call's minimum counts.
    bound: the same with efficiency 1."""

    request: PlanRequest
    read: float
    multiply: float
    efficiency: Efficiency
    predicted: float
    bound: float
    seconds: float
    others: float

    @property
    def passed(self) -> bool:
        return abs(self.predicted / self.seconds - 1) <= WITHIN

    @property
    def verdict(self) -> str:
        r = self.request
        sizes = f"{r.layers} layers of E={r.experts}, k={r.top_k}, H={r.hidden}, I={r.intermediate}, T={r.tokens}"
        return (
            f"predicted {1e3 * self.predicted:.1f} ms, measured {1e3 * self.seconds:.1f} ms "
            f"({100 * (self.predicted / self.seconds - 1):+.0f} %, at most {100 * WITHIN:.0f}): {sizes}; the roofline "
            f"alone {1e3 * self.bound:.1f} ms"
        )


def request_of(model: MoeModel, load: Load, rounds: int) -> PlanRequest:
    """Layers of the model's sizes that this machine measures in seconds: fewer experts, with as many rows each, where
    one layer is too large; fewer layers, where all are. At most the tokens of one call of the engine."""
    one = Split("one process")
    use, flops = layer_use(model, one, load), DIRECTIONS["forward"](load.case(model), 0).flops
    share = min(1.0, _MOST_BYTES / (use.expert * model.experts), _MOST_FLOPS / max(1.0, flops))
    experts = min(model.experts, max(model.top_k, int(share * model.experts)))
    left = experts / model.experts
    many = min(_MOST_BYTES / (use.expert * experts), _MOST_FLOPS / max(1.0, left * flops))
    return PlanRequest(
        layers=max(1, min(model.layers, int(many))),
        experts=experts,
        top_k=model.top_k,
        hidden=model.hidden,
        intermediate=model.intermediate,
        tokens=min(LayerSpec.chunked_prefill_size, max(1, round(left * load.tokens))),
        rank=load.rank,
        format=load.format,
        rounds=rounds,
    )


def measure(request: PlanRequest, say: Callable[[str], object] = bool) -> MeasuredStep:
    """Measure in a process of its own, and predict the same from the calibration. say: gets the progress."""
    lines: list[Sample | PlanCeilingLine] = []
    for line in lines_of_processes(__name__, [request], Sample | PlanCeilingLine):
        lines.append(line)
        if isinstance(line, PlanCeilingLine):
            say(f"round {sum(isinstance(line, PlanCeilingLine) for line in lines)} of {request.rounds}")
    return measured(request, lines)


def measured(request: PlanRequest, lines: Sequence[Sample | PlanCeilingLine]) -> MeasuredStep:
    """The result of the lines that the measuring process printed."""
    limits = [line for line in lines if isinstance(line, PlanCeilingLine)]
    calls: dict[tuple[int, int, int, str], float] = {}
    for line in lines:
        if isinstance(line, Sample):
            key = line.layer, line.tokens, line.active, line.direction
            calls[key] = min(calls.get(key, math.inf), line.ns / 1e9)
    read, multiply = max(each.read for each in limits), max(each.multiply for each in limits)
    one, calibration = Split("one process"), calibration_of(request)[0]
    points: dict[str, list[tuple[float, float]]] = {direction: [] for direction in DIRECTIONS}
    for (layer, tokens, active, direction), seconds in calls.items():
        if layer < 0:
            load = Load(tokens, request.rank, request.format)
            weights = active * layer_use(calibration, one, load).expert
            bound = works_of(calibration, load, weights)[direction].seconds(read, multiply)
            points[direction].append((tokens * calibration.top_k / active, bound / seconds))
    found = Efficiency({direction: sorted(each) for direction, each in points.items()})
    model, load = _model(request), Load(request.tokens, request.rank, request.format)
    hardware = Hardware(1, 1, 0.0, read, multiply, network=1.0, local=1.0)

    def predicted(efficiency: Efficiency) -> float:
        return step_time(model, one, hardware, load, Routing.even(model), efficiency).seconds

    return MeasuredStep(
        request=request,
        read=read,
        multiply=multiply,
        efficiency=found,
        predicted=predicted(found),
        bound=predicted(Efficiency()),
        seconds=sum(seconds for (layer, *_), seconds in calls.items() if layer >= 0),
        others=max(each.others for each in limits),
    )


def calibration_of(request: PlanRequest) -> tuple[MoeModel, list[int]]:
    """The layer that is calibrated with, and the tokens of its calls."""
    model = replace(_model(request), layers=1, experts=EXPERTS, top_k=TOP_K)
    loads = [Load(tokens, request.rank, request.format) for tokens in TOKENS]
    flops = [DIRECTIONS["forward"](load.case(model), 0).flops for load in loads]
    return model, [load.tokens for load, each in zip(loads, flops, strict=True) if each <= _MOST_CALIBRATION_FLOPS]


def _model(request: PlanRequest) -> MoeModel:
    sizes = (request.layers, request.experts, request.top_k, request.hidden, request.intermediate)
    return MoeModel("measured", *sizes, others=0, attention=())


class RandomLayer:
    """One layer of the native engine with random weights in the request's format, and calls of it."""

    def __init__(self, model: MoeModel, request: PlanRequest, *, max_cache_depth: int = 1) -> None:
        import torch

        from ktverify.bench.coded import codes_of, on_grid
        from ktverify.engines.native.layer import KTMoEWrapper

        self.model = model
        self.layer: Any = KTMoEWrapper(
            layer_idx=0,
            num_experts=model.experts,
            num_experts_per_tok=model.top_k,
            hidden_size=model.hidden,
            moe_intermediate_size=model.intermediate,
            cpuinfer_threads=processors(),
            method=METHOD_OF[request.format],
            lora_rank=request.rank,
            max_cache_depth=max_cache_depth,
        )
        step, base, scales = 2.0**-6, [], []
        for shape in self.layer.spec.expert_shapes.values():
            one = on_grid(torch.randn(1, *shape).mul_(2 * step).bfloat16(), step)
            parts = (one,) if request.format == "bf16" else codes_of(request.format, one, step)
            base.append(torch.cat([parts[0]] * model.experts))
            scales += [torch.cat([part] * model.experts) for part in parts[1:]]
        gate_proj, up_proj, down_proj = base
        slots = torch.arange(model.experts)
        self.layer.load_weights_from_tensors(gate_proj, up_proj, down_proj, slots, scales=scales or None)
        self.layer.init_lora_weights(*(torch.randn(shape).mul_(0.02) for shape in self.layer.spec.lora_shapes.values()))

    def calls(self, tokens: int) -> tuple[int, dict[str, Callable[[], object]]]:
        """A forward and its backward, of random tokens with k different experts each; how many experts they reach."""
        import torch

        x = torch.randn(tokens, self.model.hidden).bfloat16()
        weights, ids = torch.rand(tokens, self.model.experts).topk(self.model.top_k)
        self.layer.forward_sft(x, ids, weights, save_for_backward=False)  # packs the experts
        return len(set(ids.flatten().tolist())), {
            "forward": lambda: self.layer.forward_sft(x, ids, weights),
            "backward": lambda: self.layer.backward(x),
        }


def lines(request: PlanRequest) -> Iterator[Sample | PlanCeilingLine]:
    """Measure in this process."""
    import torch

    from ktverify.bench import ceilings
    from ktverify.system.timing import Clock, OtherLoad

    torch.manual_seed(0)
    torch.set_num_threads(processors())
    clock, other_data = Clock(), torch.zeros(_OTHER_DATA // 4)
    few, counts = calibration_of(request)
    calibration = RandomLayer(few, request)
    of_calibration = [(-1, tokens, *calibration.calls(tokens)) for tokens in counts]
    layers = [RandomLayer(replace(_model(request), layers=1), request) for _ in range(request.layers)]
    of_model = [(at, request.tokens, *layer.calls(request.tokens)) for at, layer in enumerate(layers)]
    # a backward takes the newest forward of its layer
    turns = [(one, direction) for one in of_calibration for direction in DIRECTIONS]
    turns += [(one, direction) for direction in DIRECTIONS for one in of_model]

    for number in range(-request.warmup, request.rounds):
        load, found = OtherLoad(), []
        for (layer, tokens, active, calls), direction in turns:
            other_data.sum()
            ns = clock.time(calls[direction])
            found.append(Sample(layer=layer, tokens=tokens, active=active, direction=direction, ns=ns))
        limits = ceilings.measure(processors(), "", 1 << 28)
        if number >= 0:
            yield from found
            yield PlanCeilingLine(read=float(limits["read"]), multiply=float(limits["multiply"]), others=load.share())


if __name__ == "__main__":
    for line in lines(PlanRequest.model_validate_json(sys.argv[1])):
        print(line.model_dump_json(), flush=True)
