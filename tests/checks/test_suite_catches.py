"""The families' own checks, run on engines with one defect each: every defect is found, and a right engine passes."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from ktverify.checks import accuracy, exact, isas, registry, tensor_parallel, trajectory
from ktverify.checks.target import Target
from ktverify.checks.trajectory import Drift, within_budgets
from ktverify.errors import EngineDied, GateFailed
from ktverify.isolation.child import Child, ChildPool, Limits
from ktverify.mutants import MUTANTS
from ktverify.pytest_plugin.ask import Ask, judge_family
from ktverify.pytest_plugin.recording import Recording, verdict_on
from ktverify.runs.store import load
from ktverify.spec import cases
from ktverify.spec.cases import Case
from ktverify.spec.names import LORA_NAMES
from ktverify.system.files import ROOT
from tests.support import unruly

RIGHT = "torch_bf16"
SMALL = Case.parse("E=6,k=2,H=96,I=64,T=24,r=8,alpha=16")
ODD = Case.parse("E=5,k=3,H=97,I=47,T=24,r=8,alpha=16")
TRAINED = Case.parse("E=6,k=2,H=128,I=96,T=32,r=8,alpha=16,lora=float32")
INTEGER = Case.parse("E=6,k=2,H=96,I=64,T=24,r=8,alpha=16,data=integer")


LIMITS = Limits(20.0, 3 << 30)


def forward(child: Child, engine: str, case: Case) -> None:
    """What suites/forward does with a case."""
    accuracy.assert_passed(child.call(judge_family, Target(engine), case.with_seed(1), "forward", True))


def backward(child: Child, engine: str, case: Case) -> None:
    """What suites/backward does with a case."""
    accuracy.assert_passed(child.call(judge_family, Target(engine), case.with_seed(1), "backward", True))


def tp_consistency(child: Child, engine: str, case: Case) -> None:
    """What suites/tp_consistency does with a case, but for the fresh processes."""
    child.call(tensor_parallel.check_degrees, Target(engine), case)


def bit_equality(child: Child, engine: str, case: Case) -> None:
    """What suites/exact does with a case."""
    child.call(exact.check_exact, target=Target(engine), case=case)


def training(child: Child, engine: str, case: Case) -> None:
    """What suites/training_loop does with a case."""
    child.call(trajectory.check_trajectory, target=Target(engine), case=case)


def update(child: Child, engine: str, case: Case) -> None:
    """The other half of suites/training_loop."""
    child.call(trajectory.check_update, target=Target(engine), case=case)


def behaves(name: str) -> Any:
    """A check of suites/contract."""

    def check(child: Child, engine: str, case: Case) -> None:
        child.call(registry.find(f"behaviour/{name}").every_tp, Target(engine))

    return check


def refusal(name: str) -> Any:
    """A row of the table of refusals."""

    def check(child: Child, engine: str, case: Case) -> None:
        child.call(registry.find(f"refusals/{name}").every_tp, Target(engine))

    return check


# defect, the check that has to find it, on which case, and a part of its message
CAUGHT = [
    ("lora_scale_one", forward, SMALL, "FAIL output"),
    ("lora_scale_one", backward, SMALL, "FAIL grad_up_lora_a"),
    ("lora_scale_one", bit_equality, INTEGER, "FAIL output"),
    ("lora_scale_one", training, TRAINED, "FAIL loss"),
    ("gate_up_exchanged", forward, SMALL, "FAIL output"),
    ("gate_up_exchanged", backward, SMALL, "FAIL grad_gate_lora_b"),
    ("gate_up_exchanged", bit_equality, INTEGER, "FAIL output"),
    ("no_routing_weight_in_backward", backward, SMALL, "FAIL grad_input"),
    ("no_routing_weight_in_backward", bit_equality, INTEGER, "FAIL grad_down_lora_b"),
    ("no_routing_weight_in_backward", training, TRAINED, "FAIL"),
    ("tp_part_lost", tp_consistency, SMALL, "TP 2: FAIL output"),
    ("tp_part_lost", tp_consistency, INTEGER, "TP 4: FAIL output"),
    ("update_does_nothing", training, TRAINED, "FAIL loss"),
    ("update_does_nothing", update, SMALL, "then update_lora_weights"),
    ("hidden_remainder_skipped", forward, ODD, "FAIL output"),
    ("hidden_remainder_skipped", backward, ODD, "FAIL grad_gate_lora_a"),
    ("idle_gradients_stale", behaves("idle_experts"), SMALL, "idle experts [5]"),
    ("expert_off_by_one", forward, SMALL, "FAIL output"),
    ("expert_off_by_one", backward, SMALL, "FAIL grad_input"),
    ("expert_off_by_one", bit_equality, INTEGER, "FAIL output"),
    ("unsynchronised", update, SMALL, "no update_lora_weights"),
    ("update_takes_half", update, SMALL, "then update_lora_weights"),
    ("results_reused", behaves("nothing_is_written"), SMALL, "output of call 1 lies where output of call 0 lies"),
    ("input_scaled_in_place", behaves("nothing_is_written"), SMALL, "written"),
    ("nan_comes_out_as_zero", behaves("non_finite_isolation"), SMALL, "was hidden"),
    ("physical_map_ignored", behaves("physical_map"), SMALL, "physical_map [3, 5, 0, 1, 4, 2]"),
    ("never_the_same", behaves("repeats"), SMALL, "the same layer again"),
    ("never_the_same", behaves("varying_tokens"), SMALL, "the bits differ"),
    ("ids_clamped", refusal("expert id 6"), SMALL, "was accepted"),
]


@pytest.mark.parametrize(
    ("defect", "check", "case", "message"),
    CAUGHT,
    ids=[f"{row[0]}-{row[1].__name__}-{index}" for index, row in enumerate(CAUGHT)],
)
def test_defect_is_found(children: ChildPool, defect: str, check: Any, case: Case, message: str) -> None:
    with pytest.raises(AssertionError) as found:
        check(children.get(), MUTANTS[defect].engine, case)
    assert message in str(found.value)


def test_backward_takes_the_newest(children: ChildPool) -> None:
    with pytest.raises(AssertionError, match="newest first: the bits differ"):
        behaves("outstanding_forwards")(children.get(), MUTANTS["oldest_first"].engine, SMALL)


@pytest.mark.parametrize("name", LORA_NAMES)
def test_a_parameter_alone_fails_a_training(name: str) -> None:
    peer = Drift(1e-3, dict.fromkeys(LORA_NAMES, 0.03))
    within_budgets("as good as torch", peer, peer)
    for far in (0.05, math.nan):
        with pytest.raises(GateFailed, match=f"FAIL {name} drift") as found:
            within_budgets("one is not", Drift(1e-3, {**peer.parameters, name: far}), peer)
        assert [gate for gate, _ in found.value.exceeded] == ["loss"]


@pytest.mark.parametrize("check", [forward, backward, tp_consistency, bit_equality, training, update])
def test_right_engine_passes(children: ChildPool, check: Any) -> None:
    check(children.get(), RIGHT, {bit_equality: INTEGER, training: TRAINED}.get(check, SMALL))


@pytest.mark.parametrize(
    ("defect", "check"), [("no_routing_weight_in_backward", forward), ("update_does_nothing", backward)]
)
def test_defect_is_not_seen_where_it_does_no_harm(children: ChildPool, defect: str, check: Any) -> None:
    check(children.get(), MUTANTS[defect].engine, SMALL)


def test_crash_is_told_from_failure(children: ChildPool) -> None:
    with pytest.raises(EngineDied, match="SIGSEGV"):
        forward(children.get(), "tests.support.unruly:Dies", SMALL)
    # and the next case gets a new process
    forward(children.get(), RIGHT, SMALL)


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
def test_what_an_engine_leaves_behind_delays_nobody(engine: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    target = Target(f"tests.support.unruly:{engine}")
    died = pytest.raises(EngineDied, match="SIGSEGV")
    with Child({unruly.PID_FILE: str(pid_file)}, limits=LIMITS) as child, died as found:
        child.call(tensor_parallel.run_degree, target=target, case=SMALL)
    assert type(found.value) is EngineDied
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(pid_file.read_text()))
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


def _pytest(run_dir: Path, *arguments: str, plugin: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if plugin is not None:
        environment["PYTHONPATH"] = str(plugin.parent)
        arguments = ("-p", plugin.stem, *arguments)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--run-dir", str(run_dir), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def _small_golden() -> str:
    return next(case.name for case in cases.select("small*") if case.tier == "default")


def test_run_of_a_broken_engine_fails(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = _pytest(
        run_dir, "suites/forward", "suites/backward", f"--engine={MUTANTS['no_routing_weight_in_backward'].engine}",
        f"--cases={_small_golden()}",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    verdicts = {record.tensor: record.verdict for record in load(run_dir).accuracy}
    assert verdicts["output"] == "PASS"
    assert verdicts["grad_input"] == "FAIL"
    assert "FAIL" in (run_dir / "accuracy.md").read_text()
    assert "python -m ktverify repro" in done.stdout
    assert "\nFAIL grad_input rel_l2 " in done.stdout
    assert not re.search(r"suites/support|conftest|Traceback|^[E>] ", done.stdout, re.MULTILINE), done.stdout


def test_run_of_a_dying_engine_fails(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = _pytest(
        run_dir, "suites/forward", "--engine=tests.support.unruly:Dies", f"--cases={_small_golden()}", "-n", "2"
    )
    assert done.returncode == 1, done.stdout
    assert {record.verdict for record in load(run_dir).accuracy} == {"CRASH"}
    assert "SIGSEGV" in (run_dir / "accuracy.md").read_text() + done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_run_that_compared_nothing_fails(tmp_path: Path, workers: tuple[str, ...]) -> None:
    plugin = tmp_path / "skip_everything.py"
    plugin.write_text(
        "import pytest\n"
        "def pytest_runtest_setup(item):\n"
        "    pytest.skip('nothing runs')\n"
    )  # fmt: skip
    done = _pytest(
        tmp_path / "run", "suites/forward", f"--engine={RIGHT}", f"--cases={_small_golden()}", *workers, plugin=plugin
    )
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
    done = _pytest(tmp_path / "run", "suites/forward", f"--engine={RIGHT}", "--cases=no_such_case")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "no_such_case" in done.stdout + done.stderr
