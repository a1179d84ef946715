"""Where a trained layer departs from a new one with the same parameters: from some update on, or a little more each."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ktverify.checks.causes import Cause
from ktverify.checks.target import Target, same_bits
from ktverify.diagnose.evidence import Evidence, Explanation, certain
from ktverify.diagnose.hypotheses.stale_lora import stale_since
from ktverify.engines.run import run_layer
from ktverify.judge.metrics import compare
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS

CASE = Case.parse("E=6,k=2,H=72,I=40,T=40,r=8,alpha=16,lora=float32")
STEPS = (1, 2, 3, 4, 6, 10, 20, 35, 50)  # updates after which both layers are compared


def drift(target: Target) -> Explanation | None:
    """Take fifty small updates of fp32 LoRA; None if the layer has the bits of a new one after each of STEPS."""
    inputs = make_inputs(CASE)
    layer = target.layer(CASE, inputs)
    run_layer(layer, inputs)
    draw = torch.Generator().manual_seed(7)
    apart: list[tuple[int, float]] = []
    before = inputs.lora
    for step in range(1, STEPS[-1] + 1):
        before = inputs.lora
        noise = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in before.items()}
        inputs = replace(inputs, lora={n: t + 0.02 * t.std() * noise[n] for n, t in before.items()})
        with torch.no_grad():
            for name, tensor in inputs.lora.items():
                getattr(layer, name).copy_(tensor)
        layer.update_lora_weights()
        if step in STEPS:
            found, fresh = run_layer(layer, inputs), target.run(CASE, inputs)
            odd = [name for name in ALL_TENSORS if not same_bits(fresh[name], found[name])]
            distance = max((compare(found[name], fresh[name].double()).rel_l2 for name in odd), default=0.0)
            apart += [(step, distance)] if distance > 0 else []
    if not apart:
        return None
    first, last = apart[0], apart[-1]
    numbers = ", ".join(f"{distance:.1e} after {step}" for step, distance in (first, apart[len(apart) // 2], last))
    slope = math.log(last[1] / first[1]) / math.log(last[0] / first[0]) if len(apart) > 2 else 0.0
    # present from the start and growing: a drift; one that appears and stays: an old value
    if slope > 0.3 and first[0] == STEPS[0]:
        said = f"the error grows with the updates, about as steps^{slope:.1f}: rel_l2 {numbers}"
        return certain(Cause.ACCUMULATION_TYPE, f"{said}; a running sum of a coarser type than fp32 does that")
    evidence = Evidence.of(inputs, run_layer(layer, inputs), target)
    old = next((each for each in stale_since(evidence, before) if each.share > 0.5), None)
    said = old.line if old is not None else f"{', '.join(evidence.failing)} are wrong after update {STEPS[-1]}"
    cause = old.cause if old is not None else Cause.ACCUMULATION_TYPE
    return certain(cause, f"from update {first[0]} on: {said} (rel_l2 {numbers})")
