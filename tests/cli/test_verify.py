"""`repro` and `verify`: what they print, write and refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ktverify.checks import target
from ktverify.checks.accuracy import check_case
from ktverify.checks.repro_commands import repro_command, verify_command
from ktverify.checks.target import Target
from ktverify.checks.training_steps import loss_problem
from ktverify.engines import registry
from ktverify.engines.native.isa import available_isas
from ktverify.mutants import MUTANTS
from ktverify.reproducer.bundle import write_result
from ktverify.spec.cases import Case
from ktverify.spec.names import ALL_TENSORS, LORA_NAMES
from ktverify.system import optional_peers
from ktverify.system.files import ROOT
from ktverify.system.machine import Amx, emulation_hint
from tests.support.command_line import TINY, call, ends, python, refused


def crash(method: str, error: str) -> str:
    return rf"CRASH {method}: {error} \(unruly\.py:\d+\)$"


def last(line: str) -> str:
    return rf"^{line}\n\Z"


BROKEN = crash("forward_sft", "ValueError: this kernel is broken")
LEFT = crash("backward", "SystemExit: 3")
# the verdict, and at least one command that repeats it
WRONG = {r"^FAIL \d+ of \d+ comparisons(, and \d+ more)?$": 1, r"(?s)python -m ktverify.*\Z": 1}
PARALLEL = r"^TP [24](, training)?: UNSUPPORTED tensor parallelism$"
FORWARD_ONLY = "^TP 1: UNSUPPORTED no backward yet$"
PASSED = {rf"^PASS {name} rel_l2 \S+, budget \S+ \(\d+ %\)": 1 for name in ALL_TENSORS}


# engine, command, exit code, how often a pattern matches; a layer has 9 tensors, 8 of them in its backward
@pytest.mark.parametrize(
    ("engine", "command", "code", "wanted"),
    [
        ("torch_bf16", "repro", 0, {"live oracle": 1, **PASSED}),
        # forward, backward and training, at TP 1, 2 and 4
        ("torch_bf16", "verify --tp all", 0, {"PASS ": 55, "PASS 54 comparisons": 1}),
        ("torch_bf16", "verify --mode forward --method AMXBF16_SFT --tp no-tp", 0, {"PASS 1 comparisons": 1}),
        ("torch_bf16", "verify --mode backward --method AMXBF16_SFT --tp no-tp", 0, {"PASS 8 comparisons": 1}),
        # what an engine cannot do is no failure, unless it can do nothing
        ("Nothing", "repro --tensor output", 1, {"^UNSUPPORTED nothing is done here$": 1}),
        ("Nothing", "verify --mode training", 1, {"UNSUPPORTED nothing is done here": 1, "PASS": 0}),
        ("OneDegree", "verify --tp all", 0, {last("PASS 18 comparisons; 36 are UNSUPPORTED"): 1, PARALLEL: 4}),
        ("Forwards", "verify", 0, {last("PASS 1 comparisons; 17 are UNSUPPORTED"): 1, FORWARD_ONLY: 1}),
        # an exception of a method is one crash, and what came before it is judged
        ("Raises", "repro", 1, {BROKEN: 1, "python -m ktverify repro": 1}),
        # forward, backward, training
        ("Raises", "verify", 1, {BROKEN: 3, last("FAIL 18 of 18 comparisons"): 1}),
        ("Leaves", "repro", 1, {LEFT: 1, "^PASS output rel_l2": 1}),
        # backward, training
        ("Leaves", "verify", 1, {LEFT: 2, last("FAIL 17 of 18 comparisons"): 1}),
        ("LeavesAtOnce", "repro", 1, {"^" + crash("constructor", "SystemExit: no licence"): 1}),
        # a clean-up that raises is a crash and hides no result
        ("Unclean", "repro", 1, {"^" + crash("clear_sft_buffer_cache", "ValueError: not now"): 1, "^PASS ": 9}),
        ("LeavesUnclean", "repro", 1, {"CRASH backward: SystemExit": 1, "not now": 0}),
        # wrong numbers
        ("gate_up_exchanged", "verify --mode forward", 1, WRONG),
        ("no_routing_weight_in_backward", "verify --mode backward", 1, WRONG),
        ("update_does_nothing", "verify --mode training", 1, WRONG),
        ("expert_off_by_one", "verify", 1, WRONG),
    ],
)
def test_what_an_engine_does_is_reported(engine: str, command: str, code: int, wanted: dict[str, int]) -> None:
    name, *options = command.split()
    case = [TINY] if name == "repro" else ["--case", TINY, "--steps", "2"]
    if engine in MUTANTS:
        engine = MUTANTS[engine].engine
    elif engine != "torch_bf16":
        engine = f"tests.support.unruly:{engine}"
    text = ends(call(name, *case, "--engine", engine, *options), code)
    assert {pattern: len(re.findall(pattern, text, re.MULTILINE)) for pattern in wanted} == wanted, text


def test_repro_fails_with_a_command_that_repeats_it() -> None:
    engine = MUTANTS["lora_scale_one"].engine
    text = ends(call("repro", TINY, "--engine", engine, "--tensor", "output", "--tensor", "grad_up_lora_a"), 1)
    assert re.search(r"^FAIL output rel_l2", text, re.MULTILINE)
    assert "grad_input" not in text
    commands = [line.strip() for line in text.splitlines() if "python -m ktverify repro" in line]
    assert len(commands) == 2
    case = Case.parse(TINY)
    assert commands[0] == f"python -m ktverify repro '{case.id}' --engine {engine} --tensor output"


def test_a_stand_alone_case_needs_no_ktverify(tmp_path: Path) -> None:
    result = check_case(Target("torch_bf16"), Case.parse(TINY))
    script = write_result(result, Target("kt_kernel"), tmp_path / "case")
    assert not re.search(r"^\s*(import|from) ktverify", script.read_text(encoding="utf-8"), re.MULTILINE)
    with safe_open(tmp_path / "case" / "case.safetensors", framework="pt") as stored:
        assert torch.equal(stored.get_tensor("inputs.up_proj"), result.problem.inputs.up_proj)
        assert {f"expected.{name}" for name in ALL_TENSORS} < set(stored.keys())
        budgets = json.loads(stored.metadata()["budgets"])
        assert json.loads(stored.metadata()["suite"]).keys() == budgets.keys() == set(ALL_TENSORS)
    refused(
        call("repro", TINY, "--engine", "torch_bf16", "--stand-alone", str(tmp_path)),
        "has no stand-alone script; it takes the attribute stand_alone",
    )


def test_a_script_of_ones_own_is_not_overwritten(tmp_path: Path) -> None:
    result = check_case(Target("torch_bf16"), Case.parse(TINY))
    (tmp_path / "run.py").write_text("mine")
    with pytest.raises(FileExistsError, match=r"run\.py is there already, and belongs to no reproducer"):
        write_result(result, Target("kt_kernel"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]
    assert (tmp_path / "run.py").read_text() == "mine"
    for _ in range(2):  # an earlier reproducer is replaced
        assert write_result(result, Target("kt_kernel"), tmp_path / "case").read_text() != "mine"


def test_repro_stops_an_engine_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import time\n\n\ndef make(**sizes):\n    time.sleep(600)\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    arguments = ("-m", "ktverify", "repro", "small", "--engine", "hanging:make", "--time-limit", "1")
    done = python(*arguments, PYTHONPATH=path)
    assert done.returncode == 1
    assert "TIMEOUT constructor: no answer after 1 s\n" in done.stdout
    assert "in make" in done.stderr


def test_repro_dumps_the_compared_tensors(tmp_path: Path) -> None:
    target = tmp_path / "case.safetensors"
    ends(call("repro", TINY, "--engine", "torch_bf16", "--dump", str(target)), 0)
    with safe_open(target, framework="pt") as stored:
        names = set(stored.keys())
        output = stored.get_tensor("expected.output")
        assert stored.metadata()["case"] == Case.parse(TINY).id
    for tensor in ALL_TENSORS:
        assert {f"actual.{tensor}", f"expected.{tensor}"} <= names
    assert {f"inputs.{name}" for name in LORA_NAMES} <= names
    assert output.shape == (17, 64)


def test_an_engine_that_cannot_be_imported_is_refused_with_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    for text, wanted in (
        ("import nowhere", r"No module named 'nowhere' \(.*mine\.py:1\)$"),
        ("1 / 0", r"ZeroDivisionError: .*mine\.py:1\)$"),
    ):
        path.write_text(text, encoding="utf-8")
        refused(call("repro", TINY, "--engine", f"{path}:make"), wanted)


def test_an_engine_is_found_by_the_path_of_its_file() -> None:
    path = ROOT / "examples" / "engine_outside" / "my_engine.py"
    factory = registry.find(f"{path}:Engine")
    assert factory is registry.find(f"{os.path.relpath(path)}:Engine")
    assert factory.__name__ == "Engine"


def test_a_hint_names_only_options_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KTVERIFY_KT_PYTHON", raising=False)
    hint = "name a Python that has kt-kernel by "
    assert optional_peers.find("kt_python", {})[1].endswith(f"{hint}KTVERIFY_KT_PYTHON")
    assert optional_peers.find("kt_python", {"kt_python": None})[1].endswith(f"{hint}--kt-python or KTVERIFY_KT_PYTHON")


def test_emulation_of_amx_is_proposed_only_where_its_kernels_run() -> None:
    assert emulation_hint(("avx512_bf16", "avx2", "scalar")).startswith("KTVERIFY_EMULATE_AMX=1 emulates")
    assert emulation_hint(("avx2", "scalar")) == emulation_hint(("amx_bf16", "avx512_bf16")) == ""


def test_a_refused_amx_says_what_runs_on_this_machine() -> None:
    isas = available_isas()
    if isas[0] == "amx_bf16":
        assert not emulation_hint(isas)  # nothing is refused here, so there is nothing to propose
        return
    ending = "; ".join([f"what can run here: {', '.join(isas)}", emulation_hint(isas)]).removesuffix("; ")
    refused(call("repro", TINY, "--isa", "amx_bf16"), f"Intel AMX not supported on this CPU.*; {ending}$")


def test_traceback_shows_where_an_error_was_raised() -> None:
    result = call("--traceback", "repro", "smal")
    assert isinstance(result.exception, ValueError)


def test_verify_trains_an_integer_case(monkeypatch: pytest.MonkeyPatch) -> None:
    # after a step nothing is an integer any more, so the native engine is judged by the budgets, not by exact bits
    monkeypatch.setenv("KTVERIFY_ISA", "scalar")
    text = ends(call("verify", "--case", "exact_small", "--mode", "training", "--steps", "3"), 0)
    assert f"PASS {len(ALL_TENSORS)} comparisons" in text
    assert "scalar" in text


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [([3.0, 2.0, 1.0], ""), ([1.0, 1.0], "does not fall"), ([1.0, float("nan")], "step 2 is nan"), ([1.0], "fall")],
)
def test_losses_must_be_finite_and_fall(losses: list[float], wanted: str) -> None:
    problem = loss_problem(losses)
    assert wanted in problem
    assert bool(problem) == bool(wanted)


def test_the_repro_command_of_an_emulated_isa_sets_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "amx_state", lambda: Amx(False, False, False, True))
    command = repro_command(Target("native", "amx_bf16", 2), Case.parse("small"))
    assert command == "KTVERIFY_EMULATE_AMX=1 python -m ktverify repro 'small@seed=0' --isa amx_bf16 --tp 2"


def test_a_printed_command_names_an_engine_whose_path_has_a_space_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my engines"
    folder.mkdir()
    (folder / "mine.py").write_text("from ktverify.engines.torch_bf16 import TorchBf16 as make", encoding="utf-8")
    monkeypatch.chdir(folder)
    text = ends(call("debug", "nan", "nan_row", "--engine", "mine.py:make", "--save", "nan.safetensors"), 1)
    engine = f"{folder}/mine.py:make"
    commands = [
        text.splitlines()[-1],
        repro_command(Target(engine), Case.parse("small")),
        verify_command(Target(engine), Case.parse("small")),
    ]
    assert [shlex.split(command)[-1] for command in commands] == [engine] * 3
