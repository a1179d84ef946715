"""No engine gets a PASS by a trick, and none that leaves its process soiled changes what is judged after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ktverify.checks import accuracy, latency, registry
from ktverify.checks.target import Target
from ktverify.diagnose import hook
from ktverify.engines.run import forward
from ktverify.errors import GateFailed, NotPassed
from ktverify.isolation import hosted, layers, sandbox
from ktverify.judge import golden
from ktverify.runs.store import load
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.system.files import ROOT
from tests.support import cheats, soiled, unruly
from tests.support.command_line import call, run_pytest

pytestmark = pytest.mark.slow
# it has a golden, and is small
CASE = Case.parse("small")
CHEATS = [cheat.__name__ for cheat in cheats.CHEATS]
# what no engine may have been able to do; the last three only where the kernel has Landlock
NEVER = ["unpickled", "ran at exit", *(["golden read", "memory opened", "signal sent"] if sandbox.landlock() else [])]


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which an engine notes what it could do."""
    monkeypatch.setenv(cheats.NOTES, str(tmp_path))
    # the search for the cause of a failure makes no call of the engine, and decides nothing
    monkeypatch.setattr(hook, "SECONDS", 0.0)
    yield tmp_path
    hosted.end_all()
    assert not [name for name in NEVER if (tmp_path / name).exists()]


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_passes_neither_repro_nor_verify(name: str) -> None:
    engine = f"{cheats.__name__}:{name}"
    for command in (("repro", "small", "--tensor", "output"), ("verify", "--mode", "forward", "--case", "small")):
        done = call(*command, "--engine", engine)
        assert done.exit_code == 1, done.output
        assert "PASS" not in done.output
        assert "UNSUPPORTED" not in done.output


@pytest.mark.parametrize("name", soiled.WRITTEN)
def test_what_an_engine_writes_into_is_named(name: str) -> None:
    """Also where all numbers are right, in a comparison, in a training and in a check of bits."""
    engine, call_of_it = f"{soiled.__name__}:writes_{name}", soiled.WRITTEN[name]
    text = f"FAIL {call_of_it} wrote into, or beside, {name}:"
    target = Target(engine)
    found = accuracy.check_case(target, CASE).records
    assert text in found[-1].message
    assert {record.verdict for record in found} <= {"PASS", "FAIL"}
    for check in ("training/fp32_parameters", "behaviour/saved_by_default"):
        one = registry.find(check)
        with pytest.raises(GateFailed, match=text) as failed:
            one.function(target, **({"case": one.case} if one.case else {}), **one.arguments)
        assert [gate for gate, _ in failed.value.exceeded] == ["written"]


def test_new_memory_has_no_right_numbers() -> None:
    """What an engine's process gets from torch and from malloc, before it writes."""
    layer = Target(f"{cheats.__name__}:ReturnsWhatLiesThere").layer(CASE, inputs := make_inputs(CASE))
    for found in (layer, Target(f"{cheats.__name__}:ReturnsWhatLiesInMalloc").layer(CASE, inputs)):
        output = forward(found, inputs, save=False).double()
        assert bool(((output.abs() > 0.1) | output.isnan()).all())


@pytest.mark.parametrize(("name", "verdict"), [("HasATable", "MISTRUSTED"), ("RemembersTheFirstCall", "FAIL")])
def test_no_time_is_reported_of_what_was_not_computed(name: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens come in another order each time; and no engine is faster than the machine."""
    case = Case.parse("E=8,k=8,H=2048,I=2048,T=128,r=8")
    monkeypatch.setattr(latency, "WARMUP", 1)
    monkeypatch.setattr(latency, "ITERATIONS", 2)
    target = Target(f"{cheats.__name__}:{name}")
    if verdict == "FAIL":
        with pytest.raises(AssertionError, match="the timed calls gave wrong results"):
            latency.measure(target, case, (1,))
        return
    timings, _ = latency.measure(target, case, (1,))
    assert [bool(timing.doubt) for timing in timings] == [True, False]
    assert [latency.record_of(t, "x", case, isa="", message="").verdict for t in timings] == [verdict, "PASS"]
    with pytest.raises(NotPassed, match=r"^MISTRUSTED forward tp=1 .* cannot be true: .* GFLOP/s take"):
        latency.expect_plausible(timings)


def test_a_judge_refuses_answers_that_an_engine_wrote(
    notes: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path_factory.mktemp("golden")
    for path in (golden.golden_dir() / golden.MANIFEST, *golden.golden_dir().glob("small.*")):
        shutil.copy(path, copy)
    for variable in ("KTVERIFY_GOLDEN_DIR", cheats.SPOILT):
        monkeypatch.setenv(variable, str(copy))
    monkeypatch.setattr(sandbox, "hidden", [])  # the real goldens' again after this test
    target = Target(f"{cheats.__name__}:WritesTheGolden")
    first = accuracy.check_case(target, CASE, backward=False)
    assert [record.verdict for record in first.records] == ["FAIL"]
    assert (notes / "golden written").exists()
    with pytest.raises(ValueError, match=r"manifest\.json has changed since this process read it first"):
        accuracy.check_case(target, CASE, backward=False)


@pytest.mark.parametrize("name", ["WritesRecords", "PlantsAPlugin"])
def test_a_cheat_passes_no_suite(name: str, tmp_path: Path) -> None:
    engine = f"--engine={cheats.__name__}:{name}"
    done = run_pytest(tmp_path / "run", "suites/forward", engine, "--cases=t*y", "-n", "1")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    records = load(tmp_path / "run").records
    assert records
    assert {record.verdict for record in records} == {"FAIL"}


def test_an_engine_that_soils_every_call_passes_a_suite(tmp_path: Path) -> None:
    """Each check gets a clean process: nothing of one reaches the next."""
    engine = f"--engine={soiled.__name__}:soils_default_device"
    done = run_pytest(tmp_path / "run", "suites/forward", engine, "--cases=t*y*")
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert {record.verdict for record in load(tmp_path / "run").records} == {"PASS"}


def test_what_an_engine_leaves_is_ended(tmp_path: Path) -> None:
    accuracy.check_case(Target(f"{cheats.__name__}:LeavesADaemon"), CASE, backward=False)
    daemon = int((tmp_path / "daemon").read_text())
    assert psutil.pid_exists(daemon)
    hosted.end_all()
    assert not psutil.pid_exists(daemon)


@pytest.mark.parametrize("soil", soiled.SOILS)
def test_a_soiled_process_is_not_used_again(soil: str) -> None:
    before = layers.state()
    target = Target(f"{soiled.__name__}:soils_{soil.replace(' ', '_')}")
    first = accuracy.check_case(target, CASE, backward=False)
    used = hosted.processes()
    hosted.end_soiled()
    assert not set(used) & set(hosted.processes())
    assert layers.state() == before
    again = accuracy.check_case(target, CASE, backward=False)
    right = accuracy.check_case(Target(f"{unruly.__name__}:OneDegree"), CASE)
    assert [record.verdict for record in first.records] == [record.verdict for record in again.records] == ["PASS"]
    assert {record.verdict for record in right.records} == {"PASS"}


def test_every_cheat_is_explained() -> None:
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    names = [*CHEATS, "Writes", "WritesTheGolden", "HasATable", "RemembersTheFirstCall"]
    assert not [name for name in names if f"`{name}`" not in text]
    assert f"each of {len(soiled.WRITTEN)} arguments" in text


def test_an_engine_may_move_its_own_files() -> None:
    result = accuracy.check_case(Target(f"{soiled.__name__}:MovesItsFiles"), CASE, backward=False)
    assert [record.verdict for record in result.records] == ["PASS"]


def test_a_clean_process_is_used_again() -> None:
    target = Target(f"{unruly.__name__}:OneDegree")
    accuracy.check_case(target, CASE)
    used = hosted.processes()
    hosted.end_soiled()
    accuracy.check_case(target, CASE)
    assert used == hosted.processes()
    assert os.getpid() not in used
