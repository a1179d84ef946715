"""The command line: exit codes, one-line errors, help to work from, and a light start."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors import safe_open
from typer.testing import CliRunner

from ktverify.checks import target
from ktverify.checks.accuracy import check_case
from ktverify.checks.repro_commands import repro_command, verify_command
from ktverify.checks.target import Target
from ktverify.checks.training_steps import loss_problem
from ktverify.cli import doctor
from ktverify.cli.main import app
from ktverify.engines import registry
from ktverify.engines.native.layer import available_isas
from ktverify.mutants import MUTANTS
from ktverify.reproducer.bundle import write_result
from ktverify.runs import store
from ktverify.spec.cases import Case, catalogue
from ktverify.spec.names import ALL_TENSORS, BACKWARD_TENSORS, LORA_NAMES
from ktverify.system import optional_peers
from ktverify.system.machine import Amx, emulation_hint
from tests.support.command_line import call, ends, refused
from tests.support.records import MACHINE, accuracy, check, latency, write

ROOT = Path(__file__).resolve().parents[2]
TINY = "E=4,k=2,H=64,I=32,T=17,r=8,alpha=16@seed=1"
TRAINING = ("make-tiny", "train", "verify-training", "compare-curves", "export-merged", "memory", "throughput")


# ---- help and a light start


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["list"]])
def test_help_and_light_commands_import_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['ktverify', *{arguments!r}]\n"
        "try:\n    runpy.run_module('ktverify', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "heavy = {'torch', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["doctor", "list", "repro", "report", "gate", "verify", "profile", *TRAINING])
def test_every_help_has_an_example_and_explains_its_options(command: str) -> None:
    text = ends(call(command, "--help"), 0)
    assert re.search(r"Examples?:\s+python -m ktverify " + command, text)
    for line in text.partition("Options:")[2].splitlines():
        if re.match(r"\s+--[a-z-]+", line):
            assert re.search(r"\s{2,}[a-zA-Z(]", line.strip()), f"option without an explanation: {line}"


def test_a_refusal_of_a_real_process_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ktverify", "repro", "deepseek_v3_t5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert re.fullmatch(r"error: no case is called 'deepseek_v3_t5'; did you mean deepseek_v3_t4.*", "\n".join(lines))
    assert done.stdout == ""


# ---- list


def test_list_prints_every_case_with_its_reason() -> None:
    text = ends(call("list"), 0)
    for case in catalogue().values():
        assert case.name in text
        assert case.why in text


def test_list_fits_a_terminal() -> None:
    for arguments in ((), ("--cost",)):
        assert max(map(len, ends(call("list", *arguments), 0).splitlines())) <= 110


def test_list_filters() -> None:
    text = ends(call("list", "small", "--cost"), 0)
    assert "small" in text
    assert "deepseek_v3_t4" not in text
    refused(call("list", "nothing_like_it"), "no case matches")
    refused(call("list", "--tier", "huge"), "--tier is 'huge', it takes one of default, big, full")
    assert "torch_bf16" in ends(call("list", "--engines"), 0)


# ---- repro


def test_repro_passes_and_prints_a_line_per_tensor() -> None:
    text = ends(call("repro", TINY, "--engine", "torch_bf16"), 0)
    for tensor in ALL_TENSORS:
        assert re.search(rf"^PASS {tensor} rel_l2 \S+, budget \S+ \(\d+ %\)", text, re.MULTILINE)
    assert "live oracle" in text


def test_repro_fails_with_a_command_that_repeats_it() -> None:
    engine = MUTANTS["lora_scale_one"].engine
    text = ends(call("repro", TINY, "--engine", engine, "--tensor", "output", "--tensor", "grad_up_lora_a"), 1)
    assert re.search(r"^FAIL output rel_l2", text, re.MULTILINE)
    assert "grad_input" not in text
    commands = [line.strip() for line in text.splitlines() if "python -m ktverify repro" in line]
    assert len(commands) == 2
    case = Case.parse(TINY)
    assert commands[0] == f"python -m ktverify repro '{case.id}' --engine {engine} --tensor output"


def test_repro_prints_the_reason_of_an_unsupported_call() -> None:
    text = ends(call("repro", TINY, "--engine", "tests.support.unruly:Nothing", "--tensor", "output"), 1)
    assert re.search(r"^UNSUPPORTED nothing is done here$", text, re.MULTILINE)
    text = ends(call("verify", "--engine", "tests.support.unruly:Nothing", "--case", TINY, "--mode", "training"), 1)
    assert "UNSUPPORTED nothing is done here" in text
    assert "PASS" not in text


def test_an_unsupported_call_is_no_failure() -> None:
    command = ("verify", "--engine", "tests.support.unruly:OneDegree", "--case", TINY, "--tp", "all", "--steps", "2")
    text = ends(call(*command), 0)
    count = len(ALL_TENSORS)
    assert text.splitlines()[-1] == f"PASS {2 * count} comparisons; {4 * count} are UNSUPPORTED"
    for line in ("TP 2", "TP 4", "TP 2, training", "TP 4, training"):
        assert text.splitlines().count(f"{line}: UNSUPPORTED tensor parallelism") == 1


def test_an_exception_of_a_method_is_one_crash() -> None:
    engine = "tests.support.unruly:Raises"
    crash = re.compile(r"CRASH forward_sft: ValueError: this kernel is broken \(unruly\.py:\d+\)$", re.MULTILINE)
    text = ends(call("repro", TINY, "--engine", engine), 1)
    assert len(crash.findall(text)) == text.count("python -m ktverify repro") == 1
    text = ends(call("verify", "--engine", engine, "--case", TINY), 1)
    assert len(crash.findall(text)) == 3  # forward, backward, training
    assert text.splitlines()[-1] == f"FAIL {2 * len(ALL_TENSORS)} of {2 * len(ALL_TENSORS)} comparisons"


def test_an_output_is_judged_where_the_backward_fails() -> None:
    gradients = len(BACKWARD_TENSORS)
    command = ("verify", "--case", TINY, "--steps", "2", "--engine")
    text = ends(call(*command, "tests.support.unruly:Forwards"), 0)
    assert text.splitlines()[-1] == f"PASS 1 comparisons; {gradients + len(ALL_TENSORS)} are UNSUPPORTED"
    assert text.splitlines().count("TP 1: UNSUPPORTED no backward yet") == 1
    text = ends(call("repro", TINY, "--engine", "tests.support.unruly:Leaves"), 1)
    assert re.search(r"^PASS output rel_l2", text, re.MULTILINE)
    crash = re.compile(r"CRASH backward: SystemExit: 3 \(unruly\.py:\d+\)$", re.MULTILINE)
    assert len(crash.findall(text)) == 1
    text = ends(call(*command, "tests.support.unruly:Leaves"), 1)
    assert len(crash.findall(text)) == 2  # backward, training
    assert text.splitlines()[-1] == f"FAIL {gradients + len(ALL_TENSORS)} of {2 * len(ALL_TENSORS)} comparisons"


def test_an_engine_that_calls_sys_exit_is_a_crash() -> None:
    text = ends(call("repro", TINY, "--engine", "tests.support.unruly:LeavesAtOnce"), 1)
    assert re.search(r"^CRASH constructor: SystemExit: no licence \(unruly\.py:\d+\)$", text, re.MULTILINE)


def test_a_clean_up_that_raises_is_a_crash_and_hides_no_result() -> None:
    text = ends(call("repro", TINY, "--engine", "tests.support.unruly:Unclean"), 1)
    assert re.search(r"^CRASH clear_sft_buffer_cache: ValueError: not now \(unruly\.py:\d+\)$", text, re.MULTILINE)
    assert len(re.findall("^PASS ", text, re.MULTILINE)) == len(ALL_TENSORS)
    text = ends(call("repro", TINY, "--engine", "tests.support.unruly:LeavesUnclean"), 1)
    assert "CRASH backward: SystemExit" in text
    assert "not now" not in text


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


def test_repro_stops_an_engine_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import time\n\n\ndef make(**sizes):\n    time.sleep(600)\n", encoding="utf-8")
    command = [sys.executable, "-m", "ktverify", "repro", "small", "--engine", "hanging:make", "--time-limit", "1"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "TIMEOUT constructor: no answer after 1 s\n" in done.stdout
    assert "Timeout" in done.stderr
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


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([TINY, "--engine", "nativ"], "no engine is called 'nativ'; did you mean native"),
        (
            [TINY, "--engine", "no.such:f"],
            "'no.such:f' cannot be imported: No module named 'no'; put .* PYTHONPATH",
        ),
        ([TINY, "--engine", "no/such.py:f"], "'/.*/no/such.py:f' cannot be imported: there is no file /.*/no/such.py$"),
        ([TINY, "--engine", "torch_bf16", "--tensor", "grad_up"], "tensor is 'grad_up', it takes one of output"),
        ([TINY, "--engine", "torch_bf16", "--tp", "5"], "TP 5 does not divide I = 32"),
        ([TINY, "--engine", "torch_bf16", "--method", "AMXInt3"], "method is 'AMXInt3', it takes one of AMXBF16_SFT"),
        (["E=4,k=8,H=64,I=32,T=3,r=8"], "k is 8, it takes at most E = 4"),
        (["small,Q=3"], "'Q=3' is not understood"),
    ],
)
def test_repro_refuses_in_one_line(arguments: list[str], wanted: str) -> None:
    refused(call("repro", *arguments), wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("import nowhere", r"No module named 'nowhere' \(.*mine\.py:1\)$"),
        ("1 / 0", r"ZeroDivisionError: .*mine\.py:1\)$"),
    ],
)
def test_an_engine_that_cannot_be_imported_is_refused_with_the_cause(text: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    refused(call("repro", TINY, "--engine", f"{tmp_path}/mine.py:make"), wanted)


def test_an_engine_is_found_by_the_path_of_its_file() -> None:
    path = ROOT / "examples" / "engine_outside" / "my_engine.py"
    factory = registry.find(f"{path}:Engine")
    assert factory is registry.find(f"{os.path.relpath(path)}:Engine")
    assert factory.__name__ == "Engine"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, "by KTVERIFY_KT_PYTHON"), ({"kt_python": None}, "by --kt-python or KTVERIFY_KT_PYTHON")],
)
def test_a_hint_names_only_options_of_its_command(
    options: dict[str, str | None], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KTVERIFY_KT_PYTHON", raising=False)
    assert optional_peers.find("kt_python", options)[1].endswith(f"name a Python that has kt-kernel {wanted}")


@pytest.mark.parametrize(
    ("isas", "helps"),
    [
        (("avx512_bf16", "avx2", "scalar"), True),
        (("avx2", "scalar"), False),
        (("amx_bf16", "avx512_bf16"), False),
    ],
)
def test_emulation_of_amx_is_proposed_only_where_its_kernels_run(isas: tuple[str, ...], helps: bool) -> None:
    assert emulation_hint(isas).startswith("KTVERIFY_EMULATE_AMX=1 emulates" if helps else "")
    assert bool(emulation_hint(isas)) is helps


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


# ---- verify


def test_verify_all_modes_and_degrees() -> None:
    text = ends(call("verify", "--engine", "torch_bf16", "--case", TINY, "--tp", "all", "--steps", "2"), 0)
    # forward, backward and training, at TP 1, 2 and 4
    assert text.count("PASS ") == 2 * 3 * len(ALL_TENSORS) + 1
    assert f"PASS {2 * 3 * len(ALL_TENSORS)} comparisons" in text


@pytest.mark.parametrize(("mode", "tensors"), [("forward", ("output",)), ("backward", BACKWARD_TENSORS)])
def test_verify_one_mode(mode: str, tensors: tuple[str, ...]) -> None:
    arguments = ("verify", "--engine", "torch_bf16", "--case", TINY, "--mode", mode, "--method", "AMXBF16_SFT")
    text = ends(call(*arguments, "--tp", "no-tp"), 0)
    assert f"PASS {len(tensors)} comparisons" in text


@pytest.mark.parametrize(
    ("defect", "mode"),
    [
        ("gate_up_exchanged", "forward"),
        ("no_routing_weight_in_backward", "backward"),
        ("update_does_nothing", "training"),
        ("expert_off_by_one", "all"),
    ],
)
def test_verify_fails_a_wrong_engine(defect: str, mode: str) -> None:
    arguments = ("verify", "--engine", MUTANTS[defect].engine, "--case", TINY, "--mode", mode, "--steps", "3")
    text = ends(call(*arguments), 1)
    assert re.search(r"^FAIL \d+ of \d+ comparisons(, and \d+ more)?$", text, re.MULTILINE)
    assert "python -m ktverify" in text


def test_verify_trains_an_integer_case(monkeypatch: pytest.MonkeyPatch) -> None:
    # after a step nothing is an integer any more, so the native engine is judged by the budgets, not by exact bits
    monkeypatch.setenv("KTVERIFY_ISA", "scalar")
    text = ends(call("verify", "--case", "exact_small", "--mode", "training", "--steps", "3"), 0)
    assert f"PASS {len(ALL_TENSORS)} comparisons" in text
    assert "scalar" in text


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--mode", "sideways"], "--mode is 'sideways', it takes one of forward, backward, training, all"),
        (["--method", "AMXInt4"], "--method is 'AMXInt4'"),
        (["--tp", "2"], "--tp is '2', it takes one of no-tp, tp, all"),
        (["--tp", "tp", "--case", "E=4,k=2,H=64,I=31,T=3,r=2"], "no TP degree above 1: I = 31"),
        (["--mode", "training", "--method", "AMXBF16_SFT_SkipLoRA"], "no gradients for"),
    ],
)
def test_verify_refuses_in_one_line(arguments: list[str], wanted: str) -> None:
    refused(call("verify", "--engine", "torch_bf16", *arguments), wanted)


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


# ---- report and gate


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """A reports directory whose newest run passes and whose older one does not."""
    write(tmp_path / "runs" / "20250101T000000Z", [accuracy(1.0)], exit_status=1)
    write(tmp_path / "runs" / "20250102T000000Z", [accuracy(), latency(), check()])
    return tmp_path


def test_report_prints_the_newest_run(reports: Path) -> None:
    text = ends(call("report", "--reports", str(reports)), 0)
    assert text.startswith("PASS All 3 checks passed.")
    assert "20250102T000000Z" in text
    text = ends(call("report", "20250101", "--reports", str(reports)), 1)
    assert text.startswith("FAIL 1 FAIL of 1 check.")


def test_report_writes_the_pages_of_a_killed_run(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "20250103T000000Z"
    store.start_run(directory, engine="native", command="pytest")
    store.Recorder(directory, worker="gw0").add(accuracy())
    text = ends(call("report", str(directory), "--write"), 1)
    assert text.startswith("FAIL The run did not finish: 1 check passed so far.")
    assert (directory / "report.html").is_file()


def test_gate_exit_codes(reports: Path) -> None:
    assert ends(call("gate", "latest", "--reports", str(reports)), 0).startswith("PASS 20250102T000000Z: 3 checks")
    text = ends(call("gate", "20250101", "--reports", str(reports)), 1)
    assert "FAIL output rel_l2" in text
    assert "FAIL 20250101T000000Z: 1 broke of 1 checks, without a baseline" in text


def test_gate_uses_the_baseline_of_the_reports_directory(reports: Path) -> None:
    ends(call("gate", "latest", "--write-baseline", "--reports", str(reports)), 0)
    assert "against 20250102T000000Z" in ends(call("gate", "latest", "--reports", str(reports)), 0)
    write(reports / "runs" / "20250104T000000Z", [accuracy(), latency()])
    text = ends(call("gate", "latest", "--reports", str(reports)), 1)
    assert "missing: check contract test_refusal[rank]" in text
    other = reports / "other.json"
    kept = (reports / "baseline.json").read_text(encoding="utf-8")
    other.write_text(kept.replace('"native"', '"torch_bf16"'), encoding="utf-8")
    (reports / "baseline.json").write_text(other.read_text(encoding="utf-8"), encoding="utf-8")
    assert "not compared with" in ends(call("gate", "latest", "--reports", str(reports)), 0)
    ends(call("gate", "latest", "--baseline", str(other), "--reports", str(reports)), 1)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["gate", "2024"], "no run named '2024'"),
        (["gate", "latest", "--baseline", "/nowhere/baseline.json"], "no baseline at /nowhere/baseline.json"),
        (["gate", "20250101", "--write-baseline"], "20250101T000000Z does not pass and is no baseline"),
        (["report", "/nowhere"], "no run at /nowhere"),
    ],
)
def test_report_and_gate_refuse_in_one_line(arguments: list[str], wanted: str, reports: Path) -> None:
    refused(call(*arguments, "--reports", str(reports)), wanted)


# ---- doctor


def test_doctor_reports_on_every_part() -> None:
    result = call("doctor")
    assert "Traceback" not in result.output
    lines = result.output.splitlines()
    assert all(re.match(r"(ok|no|note)\s", line) for line in lines)
    names = "CPU,amx_bf16,avx2,scalar,compiler,packages,native engine,training,peers of bench,memory,deepseek_v3_t4"
    for name in names.split(","):
        assert any(line[6:].startswith(name) for line in lines), name
    # states and names are aligned in columns
    assert len({line.index(line.split()[1]) for line in lines if line[6] != " "}) == 1


def lines_of(**changes: object) -> dict[str, doctor.Fact]:
    machine = type(MACHINE)(**{**vars(MACHINE), **changes})
    return {line.name: line for line in doctor.examine(machine)}


@pytest.mark.parametrize(
    ("amx", "wanted"),
    [
        (Amx(cpu=False, kernel=False, permitted=False, emulated=False), "this CPU has no AMX"),
        (Amx(cpu=True, kernel=False, permitted=False, emulated=False), "the kernel does not offer the tile state"),
    ],
)
def test_doctor_explains_why_amx_is_missing(amx: Amx, wanted: str) -> None:
    line = lines_of(amx=amx)["amx_bf16"]
    assert line.state == "no"
    assert wanted in line.text


@pytest.mark.parametrize(
    ("changes", "name", "state"),
    [
        ({"memory_available_bytes": 4 << 30}, "deepseek_v3_t4", "no"),
        ({"memory_available_bytes": 20 << 30}, "memory", "ok"),
        ({"memory_available_bytes": 1 << 30}, "memory", "no"),
        ({"versions": {}}, "compiler", "no"),
        ({"versions": {"compiler": "g++ (Debian 10.2.1-6) 10.2.1"}}, "compiler", "no"),
        ({"versions": {"compiler": "g++ (Debian 12.2.0-14+deb12u1) 12.2.0"}}, "compiler", "ok"),
        ({"huge_pages": "never"}, "huge pages", "note"),
        ({"threads": 1}, "threads", "note"),
    ],
)
def test_doctor_finds_what_is_missing(changes: dict[str, object], name: str, state: str) -> None:
    assert lines_of(**changes)[name].state == state


def test_doctor_names_the_missing_instructions() -> None:
    lacking = lines_of(isas=("scalar",), flags=())
    assert "this CPU lacks avx2, fma" in lacking["avx2"].text


def every_command(group: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield name, group
    for below, command in getattr(group, "commands", {}).items():
        yield from every_command(command, (*name, below))


def test_no_help_is_cut_or_names_an_option_twice() -> None:
    looked_at = 0
    for name, command in every_command(typer.main.get_command(app)):
        for option in command.params:
            assert len({text.replace("_", "-") for text in option.opts}) == len(option.opts), name
        lines = ends(CliRunner().invoke(app, [*name, "--help"], terminal_width=110), 0).splitlines()
        assert max(map(len, lines)) <= 110, name
        assert not [line for line in lines if re.search(r"\w\.\.\.$|\[\[", line) and not line.startswith("Usage")], name
        looked_at += 1
    assert looked_at > 30


def test_bench_takes_options_with_hyphens_or_underscores() -> None:
    for option in ("--batch_sizes", "--batch-sizes"):
        refused(call("bench", "layer", option, "none"), "--batch_sizes is 'none'")


def test_help_in_a_narrow_terminal_stays_readable() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ktverify", "gate", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
