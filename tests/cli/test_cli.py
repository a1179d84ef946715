"""The command line: exit codes, one-line errors, help to work from, and a light start."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from typer.testing import CliRunner

from ktverify.checks import target
from ktverify.checks.accuracy import check_case
from ktverify.checks.repro_commands import repro_command, verify_command
from ktverify.checks.target import Target
from ktverify.checks.training_steps import loss_problem
from ktverify.cli import doctor
from ktverify.cli.golden import app as golden_app
from ktverify.cli.main import app
from ktverify.engines import registry
from ktverify.engines.native.layer import available_isas
from ktverify.mutants import MUTANTS
from ktverify.reproducer.bundle import write_result
from ktverify.runs import store
from ktverify.spec.cases import Case, catalogue
from ktverify.spec.names import ALL_TENSORS, LORA_NAMES
from ktverify.system import optional_peers
from ktverify.system.files import ROOT
from ktverify.system.machine import Amx, emulation_hint
from tests.support.command_line import call, ends, every_command, python, refused
from tests.support.records import MACHINE, accuracy, check, latency, write

TORCH = "--engine torch_bf16"
TINY = "E=4,k=2,H=64,I=32,T=17,r=8,alpha=16@seed=1"
COMMANDS = "doctor,list,repro,report,gate,verify,profile,make-tiny,train,verify-training,compare-curves,export-merged"


# ---- help and a light start


@pytest.mark.parametrize(
    ("arguments", "code", "errors"),
    [
        (["--help"], 0, ""),
        (["report", "--help"], 0, ""),
        (["list"], 0, ""),
        (["repro", "deepseek_v3_t5"], 2, "error: no case is called 'deepseek_v3_t5'; did you mean deepseek_v3_t4.*"),
    ],
)
def test_help_refusals_and_light_commands_import_no_torch(arguments: list[str], code: int, errors: str) -> None:
    done = python("-X", "importtime", "-m", "ktverify", *arguments)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code, lines
    assert not re.search(r"\| +(torch|matplotlib|numpy)$", done.stderr, re.MULTILINE)
    assert re.fullmatch(errors, "\n".join(lines))
    assert bool(done.stdout) is (code == 0)


@pytest.mark.parametrize("command", [*COMMANDS.split(","), "memory", "throughput"])
def test_every_help_has_an_example_and_explains_its_options(command: str) -> None:
    text = ends(call(command, "--help"), 0)
    assert re.search(r"Examples?:\s+python -m ktverify " + command, text)
    for line in text.partition("Options:")[2].splitlines():
        if re.match(r"\s+--[a-z-]+", line):
            assert re.search(r"\s{2,}[a-zA-Z(]", line.strip()), f"option without an explanation: {line}"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_help_is_cut(width: int) -> None:
    """Whatever the terminal's width, the text of every option and the first sentence of every command are whole."""
    for program in (app, golden_app):
        for words, command in every_command(typer.main.get_command(program)):
            context = command.context_class(command, info_name=" ".join(words), terminal_width=width)
            text = "".join(command.get_help(context).split())
            commands = getattr(command, "commands", {}).values()
            wanted = [one.get_short_help_str(10_000) for one in commands]
            wanted += [option.help for option in command.params if getattr(option, "help", None)]
            for sentence in wanted:
                assert "".join(sentence.split()) in text, (words, sentence)


# ---- what is refused


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("no_such_command", r"error: no such command 'no_such_command'; see .* --help"),
        ("bench c2c no_such", r"error: no such command 'no_such'; see .* bench c2c --help"),
        ("debug no_such", r"error: no such command 'no_such'; see .* debug --help"),
        ("repro", r"error: missing argument 'CASE'; see .* repro --help"),
        ("repro small more", r"error: got unexpected extra argument.*more.*; see .* repro --help"),
        ("repro small --no-such", r"error: no such option: --no-such; see .* repro --help"),
        ("repro small --tp x", r"error: invalid value for '--tp': .*; see .* repro --help"),
        ("repro small --tp 0", r"error: invalid value for '--tp': .*; see .* repro --help"),
        ("repro small --tp", r"error: option '--tp' requires an argument; see --help"),
        ("list nothing_like_it", r"error: no case matches .*"),
    ],
)
def test_every_wrong_command_line_is_one_line_with_one_spelling(command: str, wanted: str) -> None:
    result = call(*command.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(wanted + "\n", result.stderr), result.stderr


@pytest.mark.parametrize("command", ["no_such", "regenerate --no-such", "regenerate --only no_such_case"])
def test_the_goldens_program_spells_its_errors_alike(command: str) -> None:
    result = CliRunner().invoke(golden_app, command.split())
    assert result.exit_code == 2
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("list nothing_like_it", "no case matches"),
        ("list --tier huge", "--tier is 'huge', it takes one of default, big, full"),
        (f"repro {TINY} --engine nativ", "no engine is called 'nativ'; did you mean native"),
        (f"repro {TINY} --engine no.such:f", "'no.such:f' cannot be imported: No module named 'no'; put .* PYTHONPATH"),
        ("repro tiny --engine no/such.py:f", "'/.*/no/such.py:f' cannot be imported: there is no file /.*/no/such.py$"),
        (f"repro {TINY} {TORCH} --tensor grad_up", "tensor is 'grad_up', it takes one of output"),
        (f"repro {TINY} {TORCH} --tp 5", "TP 5 does not divide I = 32"),
        (f"repro {TINY} {TORCH} --method AMXInt3", "method is 'AMXInt3', it takes one of AMXBF16_SFT"),
        ("repro E=4,k=8,H=64,I=32,T=3,r=8", "k is 8, it takes at most E = 4"),
        ("repro small,Q=3", "'Q=3' is not understood"),
        (f"verify {TORCH} --mode sideways", "--mode is 'sideways', it takes one of forward, backward, training, all"),
        (f"verify {TORCH} --method AMXInt4", "--method is 'AMXInt4'"),
        (f"verify {TORCH} --tp 2", "--tp is '2', it takes one of no-tp, tp, all"),
        (f"verify {TORCH} --tp tp --case E=4,k=2,H=64,I=31,T=3,r=2", "no TP degree above 1: I = 31"),
        (f"verify {TORCH} --mode training --method AMXBF16_SFT_SkipLoRA", "no gradients for"),
        ("bench layer --batch_sizes none", "--batch_sizes is 'none'"),
        ("bench layer --batch-sizes none", "--batch_sizes is 'none'"),
        ("clean --cases nosuch", "--cases nosuch: it matches none of the small default cases: "),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(command: str, wanted: str) -> None:
    refused(call(*command.split()), wanted)


# ---- list


def test_list_prints_every_case_with_its_reason() -> None:
    text = ends(call("list"), 0)
    assert all(case.name in text and case.why in text for case in catalogue().values())
    for lines in (text, ends(call("list", "--cost"), 0)):
        assert max(map(len, lines.splitlines())) <= 110


def test_list_filters() -> None:
    text = ends(call("list", "small", "--cost"), 0)
    assert "small" in text
    assert "deepseek_v3_t4" not in text
    assert "torch_bf16" in ends(call("list", "--engines"), 0)


# ---- repro and verify


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


# ---- report and gate


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """A reports directory whose newest run passes and whose older one does not."""
    write(tmp_path / "runs" / "20250101T000000Z", [accuracy(1.0)], exit_status=1)
    write(tmp_path / "runs" / "20250102T000000Z", [accuracy(), latency(), check()])
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code", "wanted"),
    [
        ("report", 0, r"PASS All 3 checks passed\..*20250102T000000Z"),
        ("report 20250101", 1, r"FAIL 1 FAIL of 1 check\."),
        ("gate latest", 0, "PASS 20250102T000000Z: 3 checks"),
        ("gate 20250101", 1, ".*FAIL output rel_l2"),
        ("gate 20250101", 1, ".*FAIL 20250101T000000Z: 1 broke of 1 checks, without a baseline"),
    ],
)
def test_report_and_gate_of_a_run(command: str, code: int, wanted: str, reports: Path) -> None:
    assert re.match(wanted, ends(call(*command.split(), "--reports", reports), code), re.DOTALL)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("gate 2024", "no run named '2024'"),
        ("gate latest --baseline /nowhere/baseline.json", "no baseline at /nowhere/baseline.json"),
        ("gate 20250101 --write-baseline", "20250101T000000Z does not pass and is no baseline"),
        ("report /nowhere", "no run at /nowhere"),
    ],
)
def test_report_and_gate_refuse_in_one_line(command: str, wanted: str, reports: Path) -> None:
    refused(call(*command.split(), "--reports", reports), wanted)


def test_report_writes_the_pages_of_a_killed_run(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "20250103T000000Z"
    store.start_run(directory, engine="native", command="pytest")
    store.Recorder(directory, worker="gw0").add(accuracy())
    text = ends(call("report", str(directory), "--write"), 1)
    assert text.startswith("FAIL The run did not finish: 1 check passed so far.")
    assert (directory / "report.html").is_file()


def test_gate_uses_the_baseline_of_the_reports_directory(reports: Path) -> None:
    def gate(*options: object, code: int = 0) -> str:
        return ends(call("gate", "latest", *options, "--reports", reports), code)

    gate("--write-baseline")
    assert "against 20250102T000000Z" in gate()
    write(reports / "runs" / "20250104T000000Z", [accuracy(), latency()])
    assert "missing: check contract test_refusal[rank]" in gate(code=1)
    other = reports / "other.json"
    kept = (reports / "baseline.json").read_text(encoding="utf-8")
    for path in (other, reports / "baseline.json"):
        path.write_text(kept.replace('"native"', '"torch_bf16"'), encoding="utf-8")
    assert "not compared with" in gate()
    gate("--baseline", other, code=1)


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
    ("changes", "name", "state", "text"),
    [
        ({"memory_available_bytes": 4 << 30}, "deepseek_v3_t4", "no", ""),
        ({"memory_available_bytes": 20 << 30}, "memory", "ok", ""),
        ({"memory_available_bytes": 1 << 30}, "memory", "no", ""),
        ({"versions": {}}, "compiler", "no", ""),
        ({"versions": {"compiler": "g++ (Debian 10.2.1-6) 10.2.1"}}, "compiler", "no", ""),
        ({"versions": {"compiler": "g++ (Debian 12.2.0-14+deb12u1) 12.2.0"}}, "compiler", "ok", ""),
        ({"huge_pages": "never"}, "huge pages", "note", ""),
        ({"threads": 1}, "threads", "note", ""),
        ({"isas": ("scalar",), "flags": ()}, "avx2", "no", "this CPU lacks avx2, fma"),
        ({}, "amx_bf16", "no", "this CPU has no AMX"),
        ({"amx": replace(MACHINE.amx, cpu=True)}, "amx_bf16", "no", "the kernel does not offer the tile state"),
    ],
)
def test_doctor_finds_what_is_missing(changes: dict[str, Any], name: str, state: str, text: str) -> None:
    facts = {fact.name: fact for fact in doctor.examine(replace(MACHINE, **changes))}
    assert facts[name].state == state
    assert text in facts[name].text


def test_no_help_is_cut_or_names_an_option_twice() -> None:
    looked_at = 0
    for name, command in every_command():
        for option in command.params:
            assert len({text.replace("_", "-") for text in option.opts}) == len(option.opts), name
        lines = ends(CliRunner().invoke(app, [*name, "--help"], terminal_width=110), 0).splitlines()
        assert max(map(len, lines)) <= 110, name
        assert not [line for line in lines if re.search(r"\w\.\.\.$|\[\[", line) and not line.startswith("Usage")], name
        looked_at += 1
    assert looked_at > 30


def test_help_in_a_narrow_terminal_stays_readable() -> None:
    text = ends(CliRunner().invoke(app, ["gate", "--help"], env={"COLUMNS": "80"}), 0)
    assert max(map(len, text.splitlines())) <= 80
