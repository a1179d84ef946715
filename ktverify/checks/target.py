"""The engine under test as the checks see it: a name, an instruction set, and how to get a loaded layer of it.

A check takes a Target, so that it runs in a child process, on any engine, unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.engines import registry
from ktverify.engines.run import METHOD, build_layer, layer_arguments, run_layer
from ktverify.errors import GateFailed
from ktverify.judge import gates
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.instruction_sets import AMX
from ktverify.system.machine import amx_state

# multiples of 32, also in four parts: an engine that fails on other sizes fails the checks that are about them
SMALL = Case.parse("E=6,k=2,H=64,I=128,T=9,r=4,alpha=8")
ODD = Case.parse("E=5,k=3,H=97,I=47,T=7,r=3,alpha=5")
# wide enough for several blocks and threads; multiples of 32, because odd sizes have checks of their own
MIDDLE = Case.parse("E=6,k=2,H=224,I=160,T=70,r=8,alpha=16")
# MIDDLE as a multiple of nothing
ODD_MIDDLE = Case.parse("E=6,k=2,H=203,I=137,T=70,r=7,alpha=16")
# another width than SMALL and MIDDLE, more experts per token
WIDE = Case.parse("E=5,k=3,H=96,I=64,T=7,r=3,alpha=5")


@dataclass(frozen=True)
class Target:
    """An engine under test and how it is called.

    engine: a name, as `registry.find` takes it. isa: what its `isa=` gets, None for its own choice. tp: tensor parallel
    degree. threads: ceiling of workers, None for all processors of this process. method: the engine's `method=`.
    gates_off: gates that its checks leave out. Only the mutants set it, to show that each gate is needed.
    ask_disclaimed: also call the engine for what it disclaims.
    """

    engine: str
    isa: str | None = None
    tp: int = 1
    threads: int | None = 2
    method: str = METHOD
    gates_off: frozenset[str] = gates.ALL_ON
    ask_disclaimed: bool = False

    @property
    def factory(self) -> registry.EngineFactory:
        """The callable that makes a layer; see `registry.judged`."""
        return registry.judged(self.engine, ask_disclaimed=self.ask_disclaimed)

    @property
    def strict(self) -> bool:
        """True for an engine that claims fp32 sums: see `registry.strict`."""
        return registry.strict(self.engine)

    @property
    def label(self) -> str:
        """The instruction set as reports show it: `isa`, the native engine's own choice, "" for other engines."""
        name = self.isa or ""
        if not name and self.engine == registry.NATIVE:
            # importing it loads the compiled engine
            from ktverify.engines.native.isa import chosen_isa

            name = chosen_isa()
        if name != AMX:
            return name
        state = amx_state()
        return f"{name} (emulated)" if state.emulated and not state.usable else name

    def bare(self, case: Case = SMALL, **more: Any) -> Any:
        """A layer without weights; `more` overrides constructor arguments."""
        return self.factory(**{**layer_arguments(case, **self.how), **more})

    def layer(self, case: Case, inputs: Inputs, **more: Any) -> Any:
        """A layer with the base weights and LoRA of `inputs`; `more` overrides how it is built, also tp and threads."""
        return build_layer(self.factory, case, inputs, **{**self.how, **more})

    def run(self, case: Case, inputs: Inputs | None = None, **more: Any) -> dict[str, Tensor]:
        """ALL_TENSORS of one forward and backward of a new layer."""
        inputs = make_inputs(case) if inputs is None else inputs
        return run_layer(self.layer(case, inputs, **more), inputs)

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of build_layer and run_case that say how the engine is called."""
        return {"isa": self.isa, "tp": self.tp, "threads": self.threads, "method": self.method}

    def asks(self, gate: str) -> bool:
        """Whether the checks of this target apply `gate`."""
        return gate not in self.gates_off

    def expect(
        self, condition: bool, message: str, gate: str, used: float = math.inf, cause: Cause | None = None
    ) -> None:
        """GateFailed with `message` unless `condition`, if this target's checks apply `gate`; see `expect`."""
        if self.asks(gate):
            expect(condition, message, gate, used, cause)

    def expect_same_bits(
        self,
        what: str,
        left: Mapping[str, Tensor],
        right: Mapping[str, Tensor],
        names: tuple[str, ...] = ALL_TENSORS,
        gate: str = "bits",
        cause: Cause | None = None,
    ) -> None:
        """`expect_same_bits`, if this target's checks apply `gate`."""
        if self.asks(gate):
            expect_same_bits(what, left, right, names, gate, cause)

    def accepted(self, what: str) -> None:
        """GateFailed: the engine should have refused `what`."""
        self.expect(False, f"{what} was accepted", "refusal")


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN equals NaN and -0 is not +0."""
    whole = tensor.detach().resolve_neg().contiguous()
    # a last dimension of size 1 may have any stride in a contiguous tensor, but not in one that is viewed as bytes
    odd = whole.dim() > 0 and whole.stride(-1) != 1
    return (whole.clone(memory_format=torch.contiguous_format) if odd else whole).view(torch.uint8)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bool(torch.equal(bits(left), bits(right)))


def expect_same_bits(
    what: str,
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    names: tuple[str, ...] = ALL_TENSORS,
    gate: str = "bits",
    cause: Cause | None = None,
) -> None:
    """GateFailed that names each of the tensors whose bits differ, and where first. cause: what that suggests."""
    wrong = []
    for name in names:
        a, b = left[name], right[name]
        if same_bits(a, b):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            wrong.append(f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
            continue
        places = (bits(a).view(*a.shape, -1) != bits(b).view(*b.shape, -1)).any(-1).nonzero()
        first = tuple(places[0].tolist())
        values = f"expected {float(a[first])}, found {float(b[first])}"
        wrong.append(f"{name}: {len(places)} of {a.numel()} differ, first {list(first)}: {values}")
    if wrong:
        raise GateFailed(f"{what}: the bits differ\n" + "\n".join(wrong), ((gate, math.inf),), cause=cause)


def expect(condition: bool, message: str, gate: str = "", used: float = math.inf, cause: Cause | None = None) -> None:
    """GateFailed with `message` unless `condition`; unlike assert, it survives python -O and needs no rewriting.

    gate: one of gates.GATES; "" for a precondition of the check itself, which raises AssertionError.
    used: the share of the gate's budget, inf for one that has none. cause: what the failure suggests, where it is
    known better than by the check alone.
    """
    if condition:
        return
    if not gate:
        raise AssertionError(message)
    raise GateFailed(message, ((gate, used),), cause=cause)
