"""The table "Refusals" of docs/contract.md: each row is tried on a layer that works, and has to work afterwards."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ktverify.checks.causes import Cause
from ktverify.checks.check import Check, Where, enter
from ktverify.checks.judging import judge_refusal
from ktverify.checks.refusal_rows import PARTS, Refusal, Setup, native_alone
from ktverify.checks.target import SMALL, Target
from ktverify.engines.run import run_layer
from ktverify.errors import EngineDied, Unsupported
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import lora_shapes

REFUSALS: dict[str, Refusal] = {name: refusal for _, part in PARTS for name, refusal in part()} | dict(native_alone())

GPU_EXPERTS = "num_gpu_experts below 0 or above E (native alone)"


def check_refusal(target: Target, name: str) -> None:
    """AssertionError unless REFUSALS[name] is refused as it says and the layer works on, with the same bits."""
    refusal = REFUSALS[name]
    inputs = make_inputs(SMALL)
    setup = Setup(target, inputs, target.layer(SMALL, inputs))
    before = run_layer(setup.layer, inputs)
    try:
        refusal.act(setup)
    except (EngineDied, Unsupported):
        raise
    except Exception as error:
        judge_refusal(target, name, error, refusal.errors, refusal.mentions)
    else:
        target.accepted(f"{name}:")
        return
    if refusal.after is not None:
        refusal.after(setup)
    target.expect_same_bits(f"{name}: before the refusal and after it", before, run_layer(setup.layer, inputs))


def check_out_of_memory(target: Target) -> None:
    """AssertionError unless four times this machine's memory of weights gets a MemoryError with both figures: how much
    was needed and how much there is.

    The tensors have stride 0, so that they take nothing here. Other layers work afterwards.
    """
    inputs = make_inputs(SMALL)
    before = target.run(SMALL, inputs)
    # wide both ways, so that only the base weights are large
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hidden = intermediate = math.isqrt(4 * memory // 6)
    wide = torch.empty(1, dtype=torch.bfloat16)
    token = torch.zeros(1, hidden, dtype=torch.bfloat16)
    sizes = {"num_experts": 1, "num_experts_per_tok": 1, "hidden_size": hidden, "lora_rank": 1}
    try:
        # an engine that packs an expert when its first token comes needs the memory only then
        layer = target.bare(SMALL, moe_intermediate_size=intermediate, **sizes)
        shapes = [(1, intermediate, hidden), (1, intermediate, hidden), (1, hidden, intermediate)]
        layer.load_weights_from_tensors(*(wide.expand(shape) for shape in shapes), torch.zeros(1, dtype=torch.int64))
        layer.init_lora_weights(
            *(torch.zeros(shape, dtype=torch.bfloat16) for shape in lora_shapes(1, hidden, intermediate, 1).values())
        )
        layer.forward_sft(token, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), save_for_backward=True)
    except MemoryError as error:
        amounts = re.findall(r"\d[\d.,]*\s*(?:[kMGT]i?B|bytes)", str(error))
        target.expect(
            len(amounts) >= 2,
            f"the error must say how much was needed and how much there is, it says {error}",
            "refusal",
        )
    else:
        target.accepted(f"{4 * memory / 2**30:.0f} GiB of weights")
    target.expect_same_bits("before the MemoryError and after it", before, target.run(SMALL, inputs))


def _check(id: str, function: Callable[..., object], contract: str, **arguments: object) -> Check:
    return Check(
        f"refusals/{id}",
        "contract",
        function,
        contract,
        ("refusal", "bits"),
        cause=Cause.IDS if id.startswith("expert id") else Cause.REFUSAL,
        arguments=arguments,
        where=Where.OWN_CHOICE,
    )


enter(_check(name, check_refusal, contract, name=name) for contract, part in PARTS for name in dict(part()))
enter([replace(_check(name, check_refusal, GPU_EXPERTS, name=name), native=True) for name in dict(native_alone())])
enter([_check("out of memory", check_out_of_memory, "more memory than there is")])
