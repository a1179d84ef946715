"""Run a check of the registry for a test: in a child process, with its records and what a failure is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ktverify.checks import accuracy, isas, registry
from ktverify.checks.check import Check, Where
from ktverify.checks.claims import judge_claim
from ktverify.checks.isas import Isa
from ktverify.checks.processes import peak_memory
from ktverify.checks.target import Target, expect
from ktverify.diagnose.hook import add_cause
from ktverify.engines.capabilities import Capability
from ktverify.engines.registry import NATIVE
from ktverify.errors import EngineOutOfMemory, NotPassed, Unsupported
from ktverify.isolation.child import ChildPool
from ktverify.runs.record import AccuracyRecord, AnyRecord
from ktverify.spec.cases import Case


def each(*kinds: str) -> pytest.MarkDecorator:
    """Parametrize a test with every check of these kinds, as `check`."""
    return pytest.mark.parametrize("check", registry.checks(*kinds), ids=lambda check: check.name.replace("/", "-"))


@dataclass(frozen=True)
class Ask:
    """Runs checks on the engine of this run.

    about: notes whose forward and backward, at which TP degree, is judged next. record: adds an accuracy record.
    recorded: notes an exception that those records already report.
    """

    engine: str
    chosen_isa: str
    fresh: int | None
    children: ChildPool
    about: Callable[[Case | None, int], None]
    record: Callable[[AnyRecord], None]
    recorded: Callable[[BaseException], None]

    def __call__(self, check: Check, isa: Isa | None = None) -> None:
        """Run `check`, on `isa` where it is one for each instruction set. Raises what it finds wrong."""
        if check.native and self.engine != NATIVE:
            pytest.skip("docs/contract.md does not ask this of every engine")
        check = check.with_seed(self.fresh)
        expect((isa is not None) == (check.where is Where.EACH_ISA), f"{check.id} runs {check.where.value}")
        target, env = self.target(check, isa)
        arguments = dict(check.arguments) if check.case is None else {"case": check.case, **check.arguments}
        for tp in check.tp:
            if check.confirmable:
                self.about(check.case, tp)
            call = self.children.call_fresh if check.fresh_process else self.children.get(env).call
            more: dict[str, Any] = {"env": env} if check.fresh_process else {}
            call(check.function, replace(target, tp=tp), **more, **arguments)

    def claim(self, claim: Capability) -> None:
        """Try what the engine claims or disclaims, on its best instruction set. Raises as `judge_claim`."""
        isa = isas.planned(self.engine, self.chosen_isa)[0]
        self.children.get(isa.env).call(judge_claim, Target(self.engine, isa.name), claim)

    def target(self, check: Check, isa: Isa | None) -> tuple[Target, dict[str, str]]:
        """The target of a check, and what its process needs in its environment."""
        if check.where is Where.OWN_CHOICE:
            return Target(self.engine), {}
        isa = isa or isas.planned(self.engine, self.chosen_isa)[0]
        return Target(self.engine, isa.name), isa.env

    def accuracy(self, check: Check, isa: Isa) -> None:
        """Run a check of the family forward or backward: a record per tensor; fails unless all of them passed."""
        check = check.with_seed(self.fresh)
        assert check.case is not None
        case, fresh, family = check.case, self.fresh is not None, check.family
        big = case.tier != "default"
        child = self.children.get(isa.env, big=big)
        target = Target(self.engine, isa.name, threads=None)
        # what fails here, a golden above all, is not the engine's fault
        try:
            child.call(accuracy.prepare, case=case, fresh=fresh)
        except (OSError, ValueError) as error:
            pytest.fail(f"{case.id} cannot be judged: {error}", pytrace=False)
        try:
            records = child.call(judge_family, target, case, family, fresh)
        except EngineOutOfMemory as error:
            of_weights = accuracy.of_weights(error, case)
            self._add(accuracy.lost(of_weights, accuracy.TENSORS[family], target, case))
            self.recorded(of_weights)
            raise of_weights from error
        except Exception as error:
            self._add(accuracy.lost(error, accuracy.TENSORS[family], target, case))
            self.recorded(error)
            raise
        self._add(records)
        try:
            accuracy.assert_passed(records)
        except (NotPassed, Unsupported) as error:
            self.recorded(error)
            raise
        if big:
            # a peak may be too short to be seen while it lasts
            peak, most = child.call(peak_memory), self.children.big.memory
            text = f"{case.id} took {peak / 2**30:.1f} GiB, it takes at most {most / 2**30:.1f} GiB"
            expect(peak <= most, text, "resources")

    def _add(self, records: list[AccuracyRecord]) -> None:
        for one in records:
            self.record(one)


def judge_family(target: Target, case: Case, family: str, fresh: bool) -> list[AccuracyRecord]:
    """The records of one family of a case, the first failing one with its cause. Runs in the child process."""
    result = accuracy.check_family(target, case, family, fresh)
    add_cause(result, target)
    return result.records
