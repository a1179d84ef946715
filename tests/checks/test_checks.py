"""The checks, run on engines with one defect each: every defect is found, a right engine passes; and their registry."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest

from ktverify.checks import accuracy, exact, isas, registry, tensor_parallel, trajectory
from ktverify.checks.check import ENTERED, Check, Where, check, enter
from ktverify.checks.target import Target
from ktverify.checks.trajectory import Drift, within_budgets
from ktverify.errors import EngineDied, GateFailed, NotPassed
from ktverify.isolation.child import Child, ChildPool, Limits
from ktverify.judge.gates import GATES
from ktverify.mutants import MUTANTS
from ktverify.pytest_plugin.ask import Ask, judge_family
from ktverify.pytest_plugin.recording import Recording, verdict_on
from ktverify.runs.store import load
from ktverify.spec import cases
from ktverify.spec.cases import Case
from ktverify.spec.names import LORA_NAMES
from ktverify.system.files import ROOT
from tests.support import unruly
from tests.support.command_line import run_pytest

RIGHT = "torch_bf16"
LIMITS = Limits(20.0, 3 << 30)
SMALL = Case.parse("E=6,k=2,H=96,I=64,T=24,r=8,alpha=16")
CASES = {
    "small": SMALL,
    "odd": Case.parse("E=5,k=3,H=97,I=47,T=24,r=8,alpha=16"),
    "trained": Case.parse("E=6,k=2,H=128,I=96,T=32,r=8,alpha=16,lora=float32"),
    "integer": Case.parse("E=6,k=2,H=96,I=64,T=24,r=8,alpha=16,data=integer"),
}
# what the other families of suites/ do with a case; tp_consistency without its fresh processes
FAMILIES: dict[str, Callable[..., object]] = {
    "tp_consistency": tensor_parallel.check_degrees,
    "exact": exact.check_exact,
    "training": trajectory.check_trajectory,
    "update": trajectory.check_update,
}


def run_check(child: Child, engine: str, check: str, case: str) -> None:
    """Run in `child` what a family of suites/ does with a case, or a check of the registry, which needs none."""
    target = Target(engine)
    if check in ("forward", "backward"):
        accuracy.assert_passed(child.call(judge_family, target, CASES[case].with_seed(1), check, True))
    elif check in FAMILIES:
        child.call(FAMILIES[check], target, CASES[case])
    else:
        child.call(registry.find(check).every_tp, target)


# defect, the check that has to find it, its case, a part of its message
CAUGHT = [
    ("lora_scale_one", "forward", "small", "FAIL output"),
    ("lora_scale_one", "backward", "small", "FAIL grad_up_lora_a"),
    ("lora_scale_one", "exact", "integer", "FAIL output"),
    ("lora_scale_one", "training", "trained", "FAIL loss"),
    ("gate_up_exchanged", "forward", "small", "FAIL output"),
    ("gate_up_exchanged", "backward", "small", "FAIL grad_gate_lora_b"),
    ("gate_up_exchanged", "exact", "integer", "FAIL output"),
    ("no_routing_weight_in_backward", "backward", "small", "FAIL grad_input"),
    ("no_routing_weight_in_backward", "exact", "integer", "FAIL grad_down_lora_b"),
    ("no_routing_weight_in_backward", "training", "trained", "FAIL"),
    ("tp_part_lost", "tp_consistency", "small", "TP 2: FAIL output"),
    ("tp_part_lost", "tp_consistency", "integer", "TP 4: FAIL output"),
    ("update_does_nothing", "training", "trained", "FAIL loss"),
    ("update_does_nothing", "update", "small", "then update_lora_weights"),
    ("hidden_remainder_skipped", "forward", "odd", "FAIL output"),
    ("hidden_remainder_skipped", "backward", "odd", "FAIL grad_gate_lora_a"),
    ("idle_gradients_stale", "behaviour/idle_experts", "", "idle experts [5]"),
    ("expert_off_by_one", "forward", "small", "FAIL output"),
    ("expert_off_by_one", "backward", "small", "FAIL grad_input"),
    ("expert_off_by_one", "exact", "integer", "FAIL output"),
    ("unsynchronised", "update", "small", "no update_lora_weights"),
    ("update_takes_half", "update", "small", "then update_lora_weights"),
    ("results_reused", "behaviour/nothing_is_written", "", "output of call 1 lies where output of call 0 lies"),
    ("input_scaled_in_place", "behaviour/nothing_is_written", "", "written"),
    ("nan_comes_out_as_zero", "behaviour/non_finite_isolation", "", "was hidden"),
    ("physical_map_ignored", "behaviour/physical_map", "", "physical_map [3, 5, 0, 1, 4, 2]"),
    ("never_the_same", "behaviour/repeats", "", "the same layer again"),
    ("never_the_same", "behaviour/varying_tokens", "", "the bits differ"),
    ("ids_clamped", "refusals/expert id 6", "", "was accepted"),
    ("oldest_first", "behaviour/outstanding_forwards", "", "newest first: the bits differ"),
]


@pytest.mark.parametrize(("defect", "check", "case", "message"), CAUGHT)
def test_defect_is_found(children: ChildPool, defect: str, check: str, case: str, message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_check(children.get(), MUTANTS[defect].engine, check, case)


@pytest.mark.parametrize(
    ("engine", "check", "case"),
    [
        (RIGHT, "forward", "small"),
        (RIGHT, "backward", "small"),
        (RIGHT, "tp_consistency", "small"),
        (RIGHT, "exact", "integer"),
        (RIGHT, "training", "trained"),
        (RIGHT, "update", "small"),
        # defects that do no harm there
        (MUTANTS["no_routing_weight_in_backward"].engine, "forward", "small"),
        (MUTANTS["update_does_nothing"].engine, "backward", "small"),
    ],
)
def test_what_is_right_passes(children: ChildPool, engine: str, check: str, case: str) -> None:
    run_check(children.get(), engine, check, case)


@pytest.mark.parametrize("name", LORA_NAMES)
def test_a_parameter_alone_fails_a_training(name: str) -> None:
    peer = Drift(1e-3, dict.fromkeys(LORA_NAMES, 0.03))
    within_budgets("as good as torch", peer, peer)
    for far in (0.05, math.nan):
        with pytest.raises(GateFailed, match=f"FAIL {name} drift") as found:
            within_budgets("one is not", Drift(1e-3, {**peer.parameters, name: far}), peer)
        assert [gate for gate, _ in found.value.exceeded] == ["loss"]


def test_crash_is_told_from_failure(children: ChildPool) -> None:
    with pytest.raises(NotPassed, match="CRASH forward_sft: the process died of SIGSEGV"):
        run_check(children.get(), "tests.support.unruly:Dies", "forward", "small")
    with pytest.raises(EngineDied, match="SIGSEGV"):
        run_check(children.get(), "tests.support.unruly:Dies", "exact", "integer")
    # and the next case gets a new process
    run_check(children.get(), RIGHT, "forward", "small")


class _Unportable(Exception):
    """Cannot be unpickled where it is raised."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(left + right)


def raises(kind: str) -> None:
    """Called in a child."""
    raise {"value": ValueError("x"), "unportable": _Unportable("x", "y"), "wrong": AssertionError("FAIL x")}[kind]


@pytest.mark.parametrize(("kind", "verdict"), [("value", "CRASH"), ("unportable", "CRASH"), ("wrong", "FAIL")])
def test_what_an_engine_raises_is_a_crash(children: ChildPool, kind: str, verdict: str) -> None:
    with pytest.raises(Exception, match="x") as found:
        children.get().call(raises, kind=kind)
    report = cast(pytest.TestReport, SimpleNamespace(passed=False, skipped=False))
    assert verdict_on(report, found.value)[0] == verdict


@pytest.mark.parametrize("engine", ["LeavesAProcess", "LeavesASession"])
def test_what_an_engine_leaves_behind_delays_no_caller(engine: str, tmp_path: Path) -> None:
    pid = tmp_path / "number"
    target = Target(f"tests.support.unruly:{engine}")
    died = pytest.raises(EngineDied, match="SIGSEGV")
    with Child({unruly.PID_FILE: str(pid)}, limits=LIMITS) as child, died as found:
        child.call(tensor_parallel.run_degree, target=target, case=SMALL)
    assert type(found.value) is EngineDied
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(pid.read_text()))
        if engine == "LeavesASession":
            process.kill()
        deadline = time.monotonic() + 5
        # a process that has ended waits until its new parent has collected its exit code
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{process} lives on"
            time.sleep(0.01)


def _interrupted(pid: int) -> int:
    raise KeyboardInterrupt


def test_a_child_that_computes_when_it_is_closed_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(limits=LIMITS)
    monkeypatch.setattr("ktverify.isolation.child.resident_of", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.call(time.sleep, 60)
    child.close()
    assert not child.alive


def test_a_missing_golden_is_no_crash_of_the_engine(
    children: ChildPool, ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children.close()
    monkeypatch.setenv("KTVERIFY_GOLDEN_DIR", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="small@seed=0 cannot be judged"):
        ask.accuracy(registry.find("forward/small"), isas.planned(RIGHT)[0])
    children.close()


# ---- whole runs


GOLDEN = next(f"--cases={case.name}" for case in cases.select("small*") if case.tier == "default")


def test_run_of_a_broken_engine_fails(tmp_path: Path) -> None:
    engine = MUTANTS["no_routing_weight_in_backward"].engine
    done = run_pytest(tmp_path, "suites/forward", "suites/backward", f"--engine={engine}", GOLDEN)
    assert done.returncode == 1, done.stdout
    verdicts = {record.tensor: record.verdict for record in load(tmp_path).accuracy}
    assert (verdicts["output"], verdicts["grad_input"]) == ("PASS", "FAIL")
    assert "FAIL" in (tmp_path / "accuracy.md").read_text()
    assert "python -m ktverify repro" in done.stdout
    assert "\nFAIL grad_input rel_l2 " in done.stdout
    assert not re.search(r"suites/support|conftest|Traceback|^[E>] ", done.stdout, re.MULTILINE), done.stdout


def test_run_of_a_dying_engine_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "suites/forward", "--engine=tests.support.unruly:Dies", GOLDEN, "-n", "2")
    assert done.returncode == 1, done.stdout
    assert {record.verdict for record in load(tmp_path).accuracy} == {"CRASH"}
    assert "SIGSEGV" in (tmp_path / "accuracy.md").read_text() + done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_run_that_compared_nothing_fails(tmp_path: Path, workers: tuple[str, ...]) -> None:
    plugin = "import pytest\ndef pytest_runtest_setup(item):\n    pytest.skip('nothing runs')\n"
    (tmp_path / "skip_everything.py").write_text(plugin)
    arguments = (f"--engine={RIGHT}", GOLDEN, "-p", "skip_everything", *workers)
    done = run_pytest(tmp_path / "run", "suites/forward", *arguments, path=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "compared nothing" in done.stdout


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [
        ("cases", "no_such_case"),
        ("isa", "no_such_isa"),
        ("engine", "no_such_engine"),
        ("engine", "tests.support.unruly:no_such_factory"),
    ],
)
def test_wrong_choice_is_refused(choice: str, wrong: str) -> None:
    options = {"engine": RIGHT, "isa": "all", "cases": None, "tier": None, choice: wrong}
    with pytest.raises(pytest.UsageError, match=wrong.rpartition(":")[2]):
        Recording(cast(pytest.Config, SimpleNamespace(option=SimpleNamespace(**options)))).check_choices()


def test_run_of_a_wrong_choice_ends_at_once(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "suites/forward", f"--engine={RIGHT}", "--cases=no_such_case")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "no_such_case" in done.stdout + done.stderr


# ---- the registry


def plain(text: str) -> str:
    """A text without Markdown and line breaks."""
    return " ".join(text.replace("`", "").replace("**", "").split())


CONTRACT = plain((ROOT / "docs" / "contract.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("one", registry.checks(), ids=lambda one: one.id)
def test_a_check_is_whole(one: Check) -> None:
    assert plain(one.contract) in CONTRACT
    assert set(one.gates) <= set(GATES)
    assert one.name
    assert (ROOT / "suites" / one.family).is_dir()
    # it travels into the process that runs it
    assert pickle.loads(pickle.dumps(one)) == one
    # a check that looks inside the native engine cannot be asked of another
    assert one.native or not one.internal


def test_every_kind_is_run_by_one_file_of_its_family() -> None:
    ran: dict[str, str] = {}
    for path in (ROOT / "suites").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        kinds = re.findall(r'"(\w+)"', " ".join(re.findall(r"@each\(([^)]*)\)", text)))
        kinds += [path.parent.name] if "ask.accuracy(" in text else []
        for kind in kinds:
            assert kind not in ran
            ran[kind] = path.parent.name
    assert ran == {one.kind: one.family for one in registry.checks()}
    assert set(ran) == set(registry.KINDS)


def test_every_mutant_names_a_check_that_any_engine_can_be_asked() -> None:
    asked = {one.id for one in registry.of_any_engine()}
    assert {mutant.check for mutant in MUTANTS.values()} <= asked


def test_no_two_checks_have_one_id() -> None:
    with pytest.raises(ValueError, match=r"two checks have the id 'behaviour/repeats'"):
        enter([ENTERED["behaviour/repeats"]])


def test_a_new_check_is_one_function() -> None:
    @check("behaviour", "Inputs, parameters and earlier results are never written to.", where=Where.OWN_CHOICE)
    def check_anything(target: Target) -> str:
        return target.engine

    try:
        found = registry.find("behaviour/anything")
        assert found in registry.checks("behaviour")
        assert found in registry.of_any_engine()
        assert found(Target("torch_bf16")) == "torch_bf16"
    finally:
        del ENTERED["behaviour/anything"]


@pytest.mark.parametrize("wrong", ["behaviour/no_such_check", "no_such_kind/x"])
def test_what_there_is_not_is_an_error(wrong: str) -> None:
    with pytest.raises(KeyError, match="there is no check"):
        registry.find(wrong)
    with pytest.raises(KeyError, match="no check is of the kind"):
        registry.checks("no_such_kind")


def test_the_readme_has_the_right_counts() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    counted = re.search(r"today there are (\d+) mutants, (\d+) checks and (\d+) gates", text)
    assert counted is not None
    # the gate of trust judges cases, not engines
    wanted = [len(MUTANTS), len(registry.of_any_engine()), len(GATES) - 1]
    assert [int(number) for number in counted.groups()] == wanted
    assert f"one of {len(MUTANTS)} engines that are wrong on purpose" in text
