"""The native engine alone: a forced instruction set is kept or refused, NUMA nodes, accumulated gradients."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ktverify.checks.check import Check, Where, check, enter
from ktverify.checks.isas import planned
from ktverify.checks.target import MIDDLE, SMALL, Target, expect
from ktverify.engines import registry
from ktverify.judge import gates, reference
from ktverify.judge.metrics import compare
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import LORA_NAMES
from ktverify.system.instruction_sets import AMX

FORCED = (
    "isa= or the variable KTVERIFY_ISA forces an instruction set; one that cannot run here is a RuntimeError (for AMX: "
    "Intel AMX not supported on this CPU), an unknown one a ValueError, and none is ever replaced in silence."
)


@contextlib.contextmanager
def _variable(isa: str | None) -> Iterator[None]:
    """KTVERIFY_ISA is `isa` inside, and not set for None."""
    before = os.environ.pop("KTVERIFY_ISA", None)
    if isa is not None:
        os.environ["KTVERIFY_ISA"] = isa
    try:
        yield
    finally:
        os.environ.pop("KTVERIFY_ISA", None)
        if before is not None:
            os.environ["KTVERIFY_ISA"] = before


@check("native", FORCED, gates=(), native=True, internal=True)
def check_isa_is_kept(target: Target) -> None:
    """A layer with `isa=`, and one with KTVERIFY_ISA, reports that instruction set as its own."""
    isa = target.isa
    expect(target.bare().isa == isa, f"isa={isa!r} gave another")
    with _variable(isa):
        expect(Target(registry.NATIVE).bare().isa == isa, f"KTVERIFY_ISA={isa} gave another")


def check_isa_refused(_target: Target, isa: str, error_name: str, mention: str, by_variable: bool) -> None:
    """AssertionError unless a layer for `isa` is refused with that error, whose text contains `mention`."""
    target = Target(registry.NATIVE, None if by_variable else isa)
    try:
        with _variable(isa if by_variable else None):
            layer = target.bare()
    except Exception as error:
        expect(type(error).__name__ == error_name, f"isa {isa}: must raise {error_name}, raised {error!r}")
        expect(mention in str(error), f"isa {isa}: the error must say {mention!r}, it says {error}")
        return
    raise AssertionError(f"isa {isa} was asked for and {layer.isa} computes: a fallback in silence")


def check_amx_is_never_replaced(_target: Target, by_variable: bool) -> None:
    """A layer for AMX computes with AMX, or is refused on a CPU without it."""
    if any(isa.name == AMX and not isa.emulated for isa in planned(registry.NATIVE)):
        with _variable(AMX if by_variable else None):
            found = Target(registry.NATIVE, None if by_variable else AMX).bare().isa
        expect(found == AMX, f"{AMX} was asked for and {found} computes")
        return
    check_isa_refused(_target, AMX, "RuntimeError", "Intel AMX not supported on this CPU", by_variable)


def _isa_check(name: str, function: Callable[..., object], **arguments: object) -> Iterator[Check]:
    for by_variable, how in ((False, "argument"), (True, "variable")):
        yield Check(
            f"isa_choice/{name}-{how}",
            "contract",
            function,
            FORCED,
            (),
            arguments={**arguments, "by_variable": by_variable},
            where=Where.OWN_CHOICE,
            native=True,
            internal=True,
        )


for _name in ("sse9", "AVX2", "avx10", " avx2"):
    enter(_isa_check(_name, check_isa_refused, isa=_name, error_name="ValueError", mention=_name))
enter(_isa_check("amx_is_never_replaced", check_amx_is_never_replaced))


@check(
    "native",
    "numa_nodes= names the NUMA node of each tensor-parallel part and changes no bit; a node without a processor for "
    "this process is a ValueError.",
    gates=("bits",),
    native=True,
    internal=True,
)
def check_numa_nodes(target: Target) -> None:
    """With all parts on any node that there is, the bits are those without numa_nodes. All other nodes are refused."""
    inputs = make_inputs(SMALL)
    wanted = target.run(SMALL, inputs, tp=2)
    there = {int(folder.name[4:]) for folder in Path("/sys/devices/system/node").glob("node[0-9]*")}
    taken = set()
    for node in range(64):
        try:
            target.bare(numa_nodes=[node])
        except ValueError as error:
            expect(f"names node {node};" in str(error), f"the error must name node {node}, it says {error}")
            continue
        taken.add(node)
        target.expect_same_bits(f"numa_nodes {node}", target.run(SMALL, inputs, tp=2, numa_nodes=[node] * 2), wanted)
    expect(taken <= there, f"nodes {sorted(taken - there)} are not there and were accepted")
    expect(bool(taken) or not there, f"no node was accepted, and there are {sorted(there)}")


@check(
    "native",
    "backward(…, accumulate=True) returns the sum over the backwards since the last update that had it set, with the "
    "error of one.",
    gates=(),
    native=True,
    internal=True,
)
def check_accumulation(target: Target) -> None:
    """backward(..., accumulate=True) sums the LoRA gradients of many different calls with the error of one call."""
    inputs = make_inputs(MIDDLE)
    layer = target.layer(MIDDLE, inputs)
    total = {name: torch.zeros_like(inputs.lora[name], dtype=torch.float64) for name in LORA_NAMES}
    found: dict[str, torch.Tensor] = {}
    for call in range(24):
        # every call has the tokens in another order and another sign: its terms neither repeat nor vanish
        here = replace(inputs, grad_output=inputs.grad_output.roll(call, 0) * (1 if call % 3 else -1))
        layer.forward_sft(here.hidden_states, here.expert_ids, here.weights, save_for_backward=True)
        found = layer.backward(here.grad_output, accumulate=True)[1]
        for name, gradient in reference.forward_backward(here).items():
            if name.removeprefix("grad_") in total:
                total[name.removeprefix("grad_")] += gradient
    for name, exact in total.items():
        apart = compare(found[f"grad_{name}"], exact).rel_l2
        limit = gates.own_limit(MIDDLE, f"grad_{name}", target.isa or "")
        assert limit is not None
        expect(apart < limit, f"grad_{name} summed over 24 calls is {apart:.1e} from the oracle, limit {limit:.1e}")
