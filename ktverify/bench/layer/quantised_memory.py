"""The most memory that a whole DeepSeek-V3 layer of quantised base weights takes, from loading to backward.

`python -m ktverify.bench.layer.quantised_memory fp8|int8|int4|mxfp4` makes 256 experts of 7168 x 2048, one by one, and
computes a forward and a backward of 128 tokens that reach all of them. After each step it prints the peak of the
resident memory so far, the interpreter and torch included. The tensors that it loads belong to the layer alone, as
those of a checkpoint would, so the layer releases each expert's as it packs it.
"""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

from ktverify.bench.coded import METHODS
from ktverify.spec.cases import Case

if TYPE_CHECKING:
    import torch

V3 = "E=256,k=8,H=7168,I=2048,T=128,r=16"


def codes(format: str, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one matrix of all experts, as load_weights_from_tensors takes them; all experts are alike."""
    import torch

    one = torch.randint(0x78, (rows, columns if format in ("fp8", "int8") else columns // 2), dtype=torch.uint8)
    every = torch.empty((experts, *one.shape), dtype=torch.uint8)
    for expert in every:
        expert.copy_(one)
    if format == "fp8":
        return every.view(torch.float8_e4m3fn), torch.full((experts, -(-rows // 128), -(-columns // 128)), 1e-4)
    if format == "int8":
        return every.view(torch.int8), torch.full((experts, rows), 1e-4)
    groups = (experts, rows, columns // 32)
    if format == "int4":
        return every.view(torch.int32), torch.full(groups, 1e-3, dtype=torch.bfloat16)
    return every, torch.full(groups, 117, dtype=torch.uint8)


def main(format: str, text: str = V3) -> None:
    import torch

    from ktverify.engines.native.layer import KTMoEWrapper
    from ktverify.engines.run import layer_arguments

    case = Case.parse(text)
    layer = KTMoEWrapper(**{**layer_arguments(case), "method": METHODS[format]})
    gate, up, down = (codes(format, case.num_experts, *shape) for shape in layer.spec.expert_shapes.values())
    physical_map = torch.arange(case.num_experts, dtype=torch.int64)
    layer.load_weights_from_tensors(gate[0], up[0], down[0], physical_map, scales=(gate[1], up[1], down[1]))
    del gate, up, down
    _say("loaded")
    layer.init_lora_weights(*(torch.full(shape, 0.01).bfloat16() for shape in layer.spec.lora_shapes.values()))
    ids = (torch.arange(case.qlen * case.top_k, dtype=torch.int64) % case.num_experts).view(case.qlen, case.top_k)
    x = torch.randn(case.qlen, case.hidden).bfloat16()
    layer.forward_sft(x, ids, torch.full(ids.shape, 1 / case.top_k), save_for_backward=True)
    _say(f"forward, {layer.packed_experts} experts packed")
    layer.backward(x)
    _say("backward")


def _say(what: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux counts KiB
    print(f"{what}: at most {peak:.2f} GiB so far", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
