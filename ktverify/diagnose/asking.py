"""Calls of an engine for the diagnosis, each in a process that may die: what it gave, and what it did instead."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ktverify.checks.registry import PRELOAD
from ktverify.checks.target import Target
from ktverify.diagnose.search import reduced
from ktverify.engines.run import run_case
from ktverify.errors import EngineDied, EngineTimeout, Unsupported
from ktverify.isolation.calls import ENGINE_EXCEPTIONS, IMPORT, CallLog, call_of, raised_in
from ktverify.isolation.child import BIG, DEFAULT, ChildPool, Limits
from ktverify.isolation.origin import describe, origin_of
from ktverify.runs.record import VerdictName
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.system.printable import shown_line

_TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")
_VERBS: dict[str, str] = {"TIMEOUT": "hangs", "OOM": "takes too much memory"}


class TimeUpError(Exception):
    """The time of the whole diagnosis was up before a call answered.

    call: the engine's method that it was in, seconds: for how long; "" and 0 where that is not known.
    """

    def __init__(self, seconds: float = 0.0, call: str = "") -> None:
        super().__init__(seconds, call)
        self.seconds, self.call = seconds, call


@dataclass(frozen=True)
class Fault:
    """What an engine did instead of computing.

    verdict: UNSUPPORTED where it declares so, else CRASH, TIMEOUT or OOM. call: the method, "" where it is not known.
    text: one line, "the engine died in backward: SIGSEGV". words: the last lines of its output. raised: it raised an
    exception, and its process lives.
    """

    verdict: VerdictName
    call: str
    text: str
    words: tuple[str, ...] = ()
    raised: bool = False

    @classmethod
    def of(cls, error: BaseException, call: str = "") -> Fault:
        """The fault for an exception of the engine. call: the method, where the caller knows it."""
        if isinstance(error, EngineDied):
            return cls.died(error)
        if isinstance(error, NotImplementedError):
            return cls("UNSUPPORTED", call, shown_line(str(error)) or "the engine gave no reason")
        call = call or origin_of(error)[0] or raised_in(error)
        return cls("CRASH", call, f"the engine raises {'in ' if call else ''}{describe(error, call)}", raised=True)

    @classmethod
    def died(cls, error: EngineDied) -> Fault:
        """The fault for a process that ended, or that was ended at a limit."""
        said, _, words = str(error).partition("; last words:\n")
        how = said.partition(": ")[2].removeprefix("the engine's process ").removeprefix("the process ")
        how = how.removeprefix("died of ").removeprefix("ended with ")
        verdict: VerdictName = error.verdict  # type: ignore[assignment]  # one of three names
        where = f" in {error.call}" if error.call else ""
        lines = tuple(line for line in words.splitlines() if line != "(none)")
        return cls(verdict, error.call, f"the engine {_VERBS.get(verdict, 'died')}{where}: {how}", lines)


@dataclass
class Given:
    """What one forward and backward gave: tensors by name, what happened instead of the others, and whether the engine
    claims fp32 sums."""

    actual: dict[str, torch.Tensor] = field(default_factory=dict)
    fault: Fault | None = None
    strict: bool = False


def compute(target: Target, case: Case, backward: bool) -> Given:
    """One forward and backward of `case` in this process. Raises what the import of the engine raises."""
    with call_of(IMPORT):
        factory = target.factory
    inputs, _ = reduced(make_inputs(case))
    # an engine may write to its inputs
    mine = replace(inputs, **{name: getattr(inputs, name).clone() for name in _TOKENS})
    given = Given(strict=target.strict)
    try:
        with CallLog() as calls:
            run_case(factory, case, inputs=mine, backward=backward, into=given.actual, **target.how)
    except ENGINE_EXCEPTIONS as error:
        given.fault = Fault.of(error, calls.failed)
    tensors = {name: tensor for name, tensor in given.actual.items() if isinstance(tensor, torch.Tensor)}
    given.actual = {name: tensor.detach() for name, tensor in tensors.items()}
    return given


def _called(path: list[str], function: Callable[..., Any], *given: Any) -> Any:
    """The value of `function` in a process that looks for an engine's module where its caller does."""
    sys.path[:] = path
    return function(*given)


class Asking(contextlib.AbstractContextManager["Asking"]):
    """The processes in which an engine is called. until: a time of time.monotonic after which no call goes on."""

    def __init__(self, limits: Limits = DEFAULT, big: Limits = BIG) -> None:
        self._limits = {False: limits, True: big}
        self._pool = ChildPool(limits, big, PRELOAD, hosts=True)
        self.until = math.inf

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def call(self, function: Callable[..., Any], /, *given: Any, fresh: bool = False, big: bool = False) -> Any:
        """The value of `function` in a process; fresh: one that nothing else used.

        Raises EngineDied, TimeUpError, Unsupported, or what the function raises.
        """
        limits, left = self._limits[big], self.until - time.monotonic()
        if left <= 0:
            raise TimeUpError
        if fresh:
            self._pool.close()
        child = self._pool.get(big=big)
        child.limits = Limits(min(limits.time_s, left), limits.memory)
        try:
            return child.call(_called, sys.path, function, *given)
        except EngineTimeout as timeout:
            if left < limits.time_s:
                raise TimeUpError(timeout.lasted, timeout.call) from None
            raise
        finally:
            if fresh:
                self._pool.close()

    def compute(self, target: Target, case: Case) -> Given:
        """ALL_TENSORS of `case`; where the engine's process ends in the backward, the output all the same."""
        big = case.tier != "default"
        try:
            found: Given = self.call(compute, target, case, True, big=big)
        except Unsupported as error:
            return Given(fault=Fault.of(error, IMPORT))
        except EngineDied as died:
            found = Given(fault=Fault.died(died))
            if died.call == "backward":
                with contextlib.suppress(EngineDied, TimeUpError):
                    found = replace(self.call(compute, target, case, False, big=big), fault=found.fault)
        return found
