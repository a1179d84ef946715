"""Every check of the default tier that an engine of one instruction set gets, by key, to be asked of any engine.

Comes in: an engine's name. Goes out: which gates it exceeded. The lists of cases are those of the families themselves.
Of what docs/contract.md does not ask, those that any layer can be asked are here as well.
Not here: latency, which judges nothing; the properties, which draw their cases; test_exact's comparison of instruction
sets; tp_constraint's test_no_degree_at_all; of contract/test_processes, whether the interpreter runs on during a call,
forks, the end of memory, the choice of an instruction set, sentinels, accumulation and the light import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from ktverify.checks import accuracy, behaviour, exact, processes, refusals, tensor_parallel, trajectory
from ktverify.checks.accuracy import Checked
from ktverify.checks.case_accuracy import TENSORS
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.isolation.child import call_fresh
from ktverify.judge import gates
from ktverify.spec import cases
from ktverify.spec.cases import Case
from suites.contract.test_behaviour import AT_ODD_SIZES, CHECKS, EDGES, OF_THE_NATIVE_ENGINE
from suites.exact.test_exact import CASES as EXACT
from suites.tp_consistency.test_tp_consistency import CASES as TP_CASES
from suites.tp_consistency.test_tp_consistency import DEGREES
from suites.tp_constraint.test_tp_constraint import PAIRS
from suites.training_loop.test_training_loop import TRAINED, UPDATED

ENGINE_RAISED = "raised"  # what the engine raised where it should have computed: no gate, and none can hide it
PRECONDITION = "check"  # a check that could not be made


@dataclass(frozen=True)
class Exceeded:
    """One gate that a check found exceeded; used: the share of its budget, inf where the budget is 0 or none."""

    gate: str
    used: float
    says: str


Check = Callable[[Target], None]


def ask(check: Check, engine: str, *off: str) -> list[Exceeded]:
    """What `check` finds wrong with `engine`, with the gates `off` left out; [] if nothing."""
    try:
        check(Target(engine, gates_off=gates.gates_off(*off)))
    except GateFailed as failed:
        says = str(failed).partition("\n")[0]
        return [Exceeded(gate, used, says) for gate, used in failed.exceeded]
    except AssertionError as error:
        return [Exceeded(PRECONDITION, float("inf"), str(error).partition("\n")[0])]
    except Exception as error:
        return [Exceeded(ENGINE_RAISED, float("inf"), f"{type(error).__name__}: {error}".partition("\n")[0])]
    return []


@functools.lru_cache(maxsize=1)
def _given(case: Case) -> Checked:
    """Inputs and expected values of `case`, for all engines that are asked one after the other."""
    return accuracy.check_case("ktverify.mutants.base:Plain", case)


def _accuracy(family: str, case: Case) -> Check:
    def check(target: Target) -> None:
        given = _given(case)
        inputs = given.inputs
        # a mutant may write into what it is given; the next one must not inherit that
        own = replace(inputs, **{name: getattr(inputs, name).clone() for name in behaviour.TOKENS})
        tensors = TENSORS[family]
        checked = accuracy.check_case(
            target.engine,
            case,
            backward=family == "backward",
            tensors=tensors,
            given=replace(given, inputs=own),
            gates_off=target.gates_off,
        )
        bad = [record for record in checked.records if record.verdict != "PASS"]
        if bad:
            exceeded = tuple((g.gate, g.used) for record in bad for g in record.gates if g.verdict != "PASS")
            raise GateFailed("\n".join(record.message for record in bad), exceeded)

    return check


def _tensor_parallel(case: Case) -> Check:
    def check(target: Target) -> None:
        found = {degree: tensor_parallel.run_degree(target, [case], degree)[0] for degree in DEGREES}
        wrong = tensor_parallel.exceeded_by(target, case, found)
        if wrong:
            raise GateFailed("\n".join(line for _, _, line in wrong), tuple((gate, used) for gate, used, _ in wrong))

    return check


def _exact(case: Case) -> Check:
    def check(target: Target) -> None:
        for tp in case.tp:
            exact.check_exact(target, case, tp)

    return check


def _fresh(name: str) -> Check:
    def check(target: Target) -> None:
        call_fresh(getattr(processes, f"check_{name}"), target)

    return check


def _of(function: Callable[..., object], *arguments: object) -> Check:
    def check(target: Target) -> None:
        function(target, *arguments)

    return check


def _table() -> dict[str, Check]:
    table: dict[str, Check] = {}
    for case in cases.select(tier="default"):
        for family in TENSORS:
            table[f"{family}/{case.name}"] = _accuracy(family, case)
    for case in EXACT:
        table[f"exact/{case.name if case.name != cases.CUSTOM else case.id}"] = _exact(case)
    for name, text in EDGES.items():
        table[f"edge/{name}"] = _of(behaviour.check_edge, Case.parse(text))
    for name in (*CHECKS, *OF_THE_NATIVE_ENGINE):
        table[f"behaviour/{name}"] = _of(getattr(behaviour, f"check_{name}"))
    for name in AT_ODD_SIZES:
        table[f"behaviour/{name}_at_odd_sizes"] = _of(getattr(behaviour, f"check_{name}"), behaviour.ODD_MIDDLE)
    for name in refusals.REFUSALS:
        table[f"refusals/{name}"] = _of(refusals.check_refusal, name)
    table["refusals/out of memory"] = _of(refusals.check_out_of_memory)
    for intermediate, degree in PAIRS:
        table[f"tp_constraint/{intermediate}/{degree}"] = _of(tensor_parallel.check_degree, intermediate, degree)
    for name, text in TP_CASES.items():
        table[f"tp/{name}"] = _tensor_parallel(Case.parse(text))
    for name, text in TRAINED.items():
        table[f"training/{name}"] = _of(trajectory.check_trajectory, Case.parse(text))
    table["training/tp"] = _of(trajectory.check_trajectory, Case.parse(TRAINED["fp32_parameters"]), 2)
    table["training/update"] = _of(trajectory.check_update, Case.parse(UPDATED))
    table["training/update_between"] = _of(trajectory.check_update_between, Case.parse(UPDATED))
    for name in ("threads_with_layers_of_their_own", "threads_that_share_a_layer", "update_while_forward_waits"):
        table[f"processes/{name}"] = _of(getattr(processes, f"check_{name}"))
    for name in ("threads_have_a_ceiling", "idle_experts_take_no_memory"):
        table[f"processes/{name}"] = _fresh(name)
    return table


TABLE = _table()
