"""Time a layer whose experts two processes divide, with one thread each, beside one process with two threads.

    torchrun --nproc-per-node 2 examples/expert_parallel_time.py

Both have the same tokens, experts and processors, and take turns: forward and backward of one layer with LoRA.
Printed are minimum and 10th percentile in milliseconds, their ratio, and what of a rank's time passed in exchanges.
"""

from __future__ import annotations

import argparse
import datetime
import time
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ktverify.engines.expert_parallel import Share
from ktverify.engines.run import build_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES
from ktverify.training.layer import Call, MOEAMXFunction


class Timed(Share):
    """A Share that adds up the seconds of its exchanges."""

    seconds: ClassVar[list[float]] = [0.0]

    def exchange(self, *given: Any) -> torch.Tensor:
        begun = time.perf_counter()
        found = super().exchange(*given)
        self.seconds[0] += time.perf_counter() - begun
        return found


class Layer:
    """Some experts of `inputs` in an engine with so many threads."""

    def __init__(self, inputs: Inputs, experts: range, top_k: int, threads: int) -> None:
        from ktverify.experts import KTMoEWrapper

        own = slice(experts.start, experts.stop)
        part = {name: getattr(inputs, name)[own] for name in BASE_NAMES}
        lora = {name: inputs.lora[name][own].contiguous() for name in LORA_NAMES}
        case = Case.parse(
            f"E={len(experts)},k={top_k},H={inputs.case.hidden},I={inputs.case.intermediate},T={inputs.case.qlen},"
            f"r={inputs.case.rank},alpha={inputs.case.alpha:g}"
        )
        given = Inputs(
            case, inputs.hidden_states, inputs.expert_ids, inputs.weights, inputs.grad_output, **part, lora=lora,
            physical_map=torch.arange(len(experts)), active=list(range(len(experts))),
        )  # fmt: skip
        rows = inputs.case.qlen * inputs.case.top_k
        self.engine = build_layer(KTMoEWrapper, case, given, threads=threads, chunked_prefill_size=rows)
        self.lora = [getattr(self.engine, name).clone().requires_grad_() for name in LORA_NAMES]

    def __call__(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        apply: Any = MOEAMXFunction.apply
        output: torch.Tensor = apply(rows, ids, weights, Call(self.engine, 0, lambda: 0, True, 2), *self.lora)
        return output


def step(compute: Any, inputs: Inputs, tokens: slice) -> float:
    """Seconds of forward and backward of these tokens."""
    x, w = (tensor[tokens].clone().requires_grad_() for tensor in (inputs.hidden_states, inputs.weights))
    begun = time.perf_counter()
    torch.autograd.backward(compute(x, inputs.expert_ids[tokens], w), inputs.grad_output[tokens])
    return time.perf_counter() - begun


def shown(name: str, seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    found = ordered[0] * 1e3, ordered[len(ordered) // 10] * 1e3
    print(f"{name:34} min {found[0]:7.1f} ms   p10 {found[1]:7.1f} ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="E=16,k=6,H=2048,I=1408,T=512,r=16,alpha=32")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    share = Timed(dist.group.WORLD, Case.parse(given.case).num_experts)
    inputs = make_inputs(Case.parse(given.case))
    case, size = inputs.case, share.size
    own = Layer(inputs, share.experts, 1, 1)
    alone = Layer(inputs, range(case.num_experts), case.top_k, size) if share.rank == 0 else None
    tokens = slice(share.rank * case.qlen // size, (share.rank + 1) * case.qlen // size)
    one, many, exchanged = [], [], []
    for turn in range(given.rounds + 2):
        dist.barrier()
        if alone is not None:
            one.append(step(alone, inputs, slice(None)))
        dist.barrier()
        Timed.seconds[0] = 0.0
        begun = time.perf_counter()
        step(lambda *tensors: share.forward(own, *tensors), inputs, tokens)
        dist.barrier()  # the layer is done when its last rank is
        many.append(time.perf_counter() - begun)
        exchanged.append(Timed.seconds[0] / many[-1])
        if turn == 1:  # experts are packed in the first calls
            one, many, exchanged = [], [], []
    if share.rank == 0:
        first = shown(f"one process, {size} threads", one)
        second = shown(f"{size} ranks, 1 thread each", many)
        print(f"ratio of minima {second[0] / first[0]:.3f}, of 10th percentiles {second[1] / first[1]:.3f}")
        print(
            f"of a rank's time in exchanges, with waiting: least {min(exchanged):.1%}, median "
            f"{sorted(exchanged)[len(exchanged) // 2]:.1%}"
        )


if __name__ == "__main__":
    main()
