"""Check and time a layer whose experts are shared between a GPU and the engine. At most five minutes.

    python examples/hybrid_on_gpu.py [cuda:0]

Prints a line for each question, PASS or FAIL, and exits with 1 if one failed; SKIP, and 0, without a GPU.
Asked: numbers, and the same bits again; pinned copies, a stream of its own; whether the GPU computes while the
engine does; what lies in the GPU's memory; MemoryError where it does not suffice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ktverify.checks.judging import judged
from ktverify.checks.target import Target, same_bits
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, run_layer
from ktverify.errors import GateFailed
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import lora_shapes

SMALL = tuple(
    Case.parse(f"E=8,k=3,H={h},I={i},T=64,r=8,alpha=16,routing={routing}")
    for h, i in ((256, 128), (202, 102))  # of grouped_mm, and of a loop over experts
    for routing in ("uniform", "masked", "duplicate")
)
MASKS = {"one": [5], "half": [1, 2, 5, 7], "all": list(range(8))}
EXPERTS, HIDDEN, INTERMEDIATE, RANK, TOP_K = 16, 2048, 1408, 16, 4
TOKENS, ROUNDS = 512, 10
MIB = 1 << 20
failed: list[str] = []


def verdict(passed: bool, text: str) -> None:
    print(f"{'PASS' if passed else 'FAIL'} {text}", flush=True)
    if not passed:
        failed.append(text)


def numbers(device: str) -> None:
    """The budgets of the suite, and the same bits again, for masks of one, half and all experts."""
    target = Target("native")
    for case in SMALL:
        inputs = make_inputs(case)
        for label, there in MASKS.items():
            mask = [expert in there for expert in range(8)]
            layer = build_layer(KTMoEWrapper, case, inputs, gpu_experts_mask=mask, gpu_device=device)
            found = {name: tensor.clone() for name, tensor in run_layer(layer, inputs).items()}
            what = f"numbers, {case.id}, mask of {label}"
            try:
                judged(target, what, case, found, inputs)
            except GateFailed as error:
                verdict(False, " ".join(str(error).split()))
                continue
            again = run_layer(layer, inputs)
            odd = [name for name in found if not same_bits(found[name], again[name])]
            verdict(not odd, f"{what}: within the budgets; other bits in a second call: {', '.join(odd) or 'none'}")


def large_layer(device: str) -> KTMoEWrapper:
    """A layer of random weights, the first half of its experts on the GPU."""
    layer = KTMoEWrapper(
        layer_idx=0, num_experts=EXPERTS, num_experts_per_tok=TOP_K, hidden_size=HIDDEN, lora_rank=RANK,
        moe_intermediate_size=INTERMEDIATE, cpuinfer_threads=1024, num_gpu_experts=EXPERTS // 2, gpu_device=device,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    shapes = [(EXPERTS, *shape) for shape in layer.spec.expert_shapes.values()]
    sizes = lora_shapes(EXPERTS, HIDDEN, INTERMEDIATE, RANK).values()
    weights, lora = (
        [torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in each] for each in (shapes, sizes)
    )
    layer.load_weights_from_tensors(*weights, torch.arange(EXPERTS))
    layer.init_lora_weights(*lora)
    return layer


def step(layer: KTMoEWrapper, experts: range) -> Callable[[], None]:
    """A forward and a backward of TOKENS tokens; slots of other experts than `experts` get the id -1."""
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    every = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    ids = torch.where((every >= experts.start) & (every < experts.stop), every, -1)
    weights = torch.full((TOKENS, TOP_K), 1 / TOP_K)

    def run() -> None:
        layer.forward_sft(x, ids, weights)
        layer.backward(grad)

    return run


def fastest(run: Callable[[], None]) -> float:
    """Seconds of the fastest of ROUNDS calls, after two."""
    times = []
    for _ in range(ROUNDS + 2):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times[2:])


def overlap(device: str) -> None:
    """Both sides together take less than one after the other; all copies are pinned, on the layer's own stream."""
    half = EXPERTS // 2
    layer = large_layer(device)
    engine, gpu, both = (fastest(step(layer, of)) for of in (range(half, EXPERTS), range(half), range(EXPERTS)))
    hidden = (engine + gpu - both) / min(engine, gpu)
    times = f"engine {engine * 1e3:.1f} ms, GPU {gpu * 1e3:.1f} ms, both {both * 1e3:.1f} ms"
    verdict(hidden > 0.25, f"overlap: {times}: {hidden:.0%} of the shorter one is hidden, more than 25 % is wanted")
    from torch.profiler import ProfilerActivity, profile

    run = step(layer, range(EXPERTS))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
    copies = [event.name for event in profiled.events() or () if "Memcpy" in event.name]
    pageable = sorted({name for name in copies if "Pageable" in name})
    verdict(bool(copies) and not pageable, f"copies: {len(copies)} between the memories, {pageable or 'all pinned'}")
    own: Any = layer._device
    verdict(own._stream != torch.cuda.default_stream(torch.device(device)), "stream: the layer's own")


def memory(device: str) -> None:
    """The GPU holds the bf16 weights and LoRA of its experts, and nothing of a call after it; a full one is refused."""

    def allocated() -> float:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device) / MIB

    half, before = EXPERTS // 2, allocated()
    layer = large_layer(device)
    wanted = half * 2 * (3 * HIDDEN * INTERMEDIATE + 3 * RANK * (HIDDEN + INTERMEDIATE)) / MIB
    held = allocated() - before
    verdict(held <= wanted + 1, f"memory: {held:.1f} MiB, weights and LoRA are {wanted:.1f} MiB")
    run = step(layer, range(EXPERTS))
    run()  # libraries take their own memory once
    before = allocated()
    for _ in range(5):
        run()
    verdict(allocated() - before <= 1, f"memory: {allocated() - before:.1f} MiB more after five steps")
    layer.set_gpu_experts_mask([expert % 2 == 0 for expert in range(EXPERTS)])
    run()
    verdict(allocated() - before <= 1, f"memory: {allocated() - before:.1f} MiB more after a move")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    taken = torch.empty(max(0, free - 200 * MIB), dtype=torch.uint8, device=device)  # all experts are 276 MiB
    try:
        layer.set_gpu_experts_mask([True] * EXPERTS)
    except MemoryError as error:
        verdict("\n" not in str(error), f"full GPU: MemoryError: {error}")
    else:
        verdict(False, "full GPU: all experts were moved there")
    del taken
    run()
    verdict(layer.spec.num_gpu_experts == half, "full GPU: the layer stays as it was, and works")


def main() -> int:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda:0"
    if not torch.cuda.is_available():
        print(f"SKIP torch {torch.__version__} sees no GPU here")
        return 0
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for part in (numbers, overlap, memory):
        part(device)
    print(f"FAIL {len(failed)} questions" if failed else "PASS all questions")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
