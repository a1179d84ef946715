"""Forks, threads, memory, the interpreter's lock, and instruction sets chosen by name."""

from __future__ import annotations

import pytest

from ktverify.checks import isas, native_memory, native_sentinels, processes
from ktverify.checks.isas import AMX, Isa
from ktverify.checks.processes import loaded_modules
from ktverify.checks.target import Target
from ktverify.isolation.child import ChildPool, call_fresh

# these depend on what happened in the process before
IN_A_FRESH_PROCESS = ["threads_have_a_ceiling", "idle_experts_take_no_memory"]
CHECKS = ["update_while_forward_waits"]
# more than docs/contract.md asks of every engine
OF_THE_NATIVE_ENGINE = ["threads_with_layers_of_their_own", "threads_that_share_a_layer", "interpreter_runs_on"]
OF_THE_NATIVE_ENGINE_IN_A_FRESH_PROCESS = [
    "fork_before_use",
    "fork_during_a_call",
    "no_memory_half_way",
    "no_memory_for_another_dtype",
    "reload_refused_while_forward_waits",
]
WHAT_IS_DROPPED = [
    "never_twice",
    "held_ones_stay",
    "lent_memory_stays",
    "experts_that_share_memory_stay",
    "threads_reach_it_at_once",
    "gradient_memory_comes_back",
]


@pytest.fixture
def best(engine: str, pytestconfig: pytest.Config) -> Isa:
    """The best instruction set of the run: these checks look at what all of them share."""
    return isas.planned(engine, pytestconfig.option.isa)[0]


@pytest.mark.parametrize("check", CHECKS)
def test_process(engine: str, children: ChildPool, best: Isa, check: str) -> None:
    children.get(best.env).call(getattr(processes, f"check_{check}"), target=Target(engine, best.name))


@pytest.mark.parametrize("check", IN_A_FRESH_PROCESS)
def test_fresh_process(engine: str, best: Isa, check: str) -> None:
    call_fresh(getattr(processes, f"check_{check}"), env=best.env, target=Target(engine, best.name))


@pytest.fixture
def native(engine: str) -> None:
    if engine != "native":
        pytest.skip("docs/contract.md does not ask this of every engine")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("check", OF_THE_NATIVE_ENGINE)
def test_native_process(engine: str, children: ChildPool, best: Isa, check: str) -> None:
    children.get(best.env).call(getattr(processes, f"check_{check}"), target=Target(engine, best.name))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("check", OF_THE_NATIVE_ENGINE_IN_A_FRESH_PROCESS)
def test_native_fresh_process(engine: str, best: Isa, check: str) -> None:
    call_fresh(getattr(processes, f"check_{check}"), env=best.env, target=Target(engine, best.name))


@pytest.mark.usefixtures("native")
def test_chosen_isa_is_kept(children: ChildPool, isa: Isa) -> None:
    children.get(isa.env).call(processes.check_isa_is_kept, isa=isa.name)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
@pytest.mark.parametrize("isa_name", ["sse9", "AVX2", "avx512", " avx2"])
def test_unknown_isa(children: ChildPool, isa_name: str, by_variable: bool) -> None:
    children.get().call(
        processes.check_isa_refused,
        isa=isa_name,
        error_name="ValueError",
        mention=isa_name,
        by_variable=by_variable,
    )


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
def test_amx_is_never_replaced(engine: str, children: ChildPool, by_variable: bool) -> None:
    if any(isa.name == AMX and not isa.emulated for isa in isas.planned(engine)):
        pytest.skip("this CPU has AMX")
    children.get().call(
        processes.check_isa_refused,
        isa=AMX,
        error_name="RuntimeError",
        mention="Intel AMX not supported on this CPU",
        by_variable=by_variable,
    )


@pytest.mark.usefixtures("native")
def test_sentinels(engine: str, children: ChildPool, isa: Isa) -> None:
    children.get(isa.env).call(native_sentinels.check_sentinels, target=Target(engine, isa.name))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("check", WHAT_IS_DROPPED)
def test_what_the_caller_drops(best: Isa, check: str) -> None:
    call_fresh(getattr(native_memory, f"check_{check}"), env=best.env)


@pytest.mark.usefixtures("native")
def test_accumulation(children: ChildPool, isa: Isa) -> None:
    children.get(isa.env).call(processes.check_accumulation, isa=isa.name)


def test_import_is_light() -> None:
    modules = loaded_modules("import ktverify")
    assert "torch" not in modules
    assert "numpy" not in modules
