"""A check: one requirement on an engine, as an object.

A module of this room enters its functions with `@check(...)` or `enter(...)`; `registry` imports these modules and
lists the checks. A new check is one function in one file: pytest, `mutants` and `diagnose` find it in the registry.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ktverify.checks.causes import Cause
from ktverify.checks.target import Target
from ktverify.spec.cases import Case

Function = TypeVar("Function", bound=Callable[..., object])


class Where(enum.Enum):
    """The instruction sets of the engine that a check runs on."""

    EACH_ISA = "on each instruction set"
    BEST_ISA = "on the best instruction set"
    OWN_CHOICE = "on the engine's own choice"


@dataclass(frozen=True)
class Check:
    """One requirement on an engine.

    id: "<kind>/<name>". family: the folder of suites/ that runs it. function: a function of a module (it is pickled by
    reference) that takes a Target, then `case` where there is one, then `arguments`; it raises GateFailed, or what the
    engine raises. contract: the sentence of docs/contract.md that it checks. gates: those of
    `gates.GATES` that it can find exceeded. cause: what its failure suggests; a function may name a better one.
    confirmable: a reproducer can be written, because one forward and backward of `case` shows the failure.
    tp: the tensor parallel degrees that it runs at. fresh_process: what happened in the process before matters to it.
    native: the contract asks it of the native engine alone, so pytest skips it for others; mutants are asked it all the
    same. internal: it looks inside the native engine, so no other can be asked.
    drawn: hypothesis draws its case.
    """

    id: str
    family: str
    function: Callable[..., object]
    contract: str
    gates: tuple[str, ...]
    cause: Cause = Cause.OTHER
    case: Case | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    confirmable: bool = False
    tp: tuple[int, ...] = (1,)
    where: Where = Where.EACH_ISA
    fresh_process: bool = False
    native: bool = False
    internal: bool = False
    drawn: bool = False

    @property
    def kind(self) -> str:
        """The part of the id before its first slash."""
        return self.id.partition("/")[0]

    @property
    def name(self) -> str:
        """The part of the id after its first slash."""
        return self.id.partition("/")[2]

    def __call__(self, target: Target) -> object:
        """Run the check on `target` in this process, at its present tensor parallel degree."""
        return self.function(target, *(() if self.case is None else (self.case,)), **self.arguments)

    def every_tp(self, target: Target) -> None:
        """Run the check on `target` in this process, at each of its tensor parallel degrees."""
        for tp in self.tp:
            self(replace(target, tp=tp))

    def with_seed(self, seed: int | None) -> Check:
        """The same check on other inputs; unchanged for None, or where it has no case."""
        if seed is None or self.case is None:
            return self
        return replace(self, case=self.case.with_seed(seed))


ENTERED: dict[str, Check] = {}


def enter(checks: Iterable[Check]) -> None:
    """Add checks to those of the registry. ValueError for an id that is there already."""
    for one in checks:
        if one.id in ENTERED:
            raise ValueError(f"two checks have the id {one.id!r}")
        ENTERED[one.id] = one


def check(
    kind: str,
    contract: str,
    *,
    family: str = "contract",
    gates: tuple[str, ...] = ("bits",),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Callable[[Function], Function]:
    """Enter a function as the check "<kind>/<its name without check_>".

    variants: suffix of the name -> the arguments that the function gets then. more: further fields of Check.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__.removeprefix("check_")
        for suffix, arguments in (variants or {"": {}}).items():
            enter([Check(f"{kind}/{name}{suffix}", family, function, contract, gates, arguments=arguments, **more)])
        return function

    return decorate
