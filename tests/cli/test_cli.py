"""The command line: exit codes, one-line errors, help to work from, and a light start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ktverify.cli.golden import app as golden_app
from ktverify.cli.main import app
from ktverify.runs import store
from ktverify.spec.cases import catalogue
from tests.support.command_line import TINY, TORCH, call, ends, every_command, refused, started
from tests.support.records import accuracy, check, latency, write

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
    done = started("-X", "importtime", "-m", "ktverify", *arguments)
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


NUMBERS = (
    "repro tiny --time-limit", "verify --time-limit", "diagnose tiny --time-limit", "diagnose tiny --memory-limit",
    "diagnose tiny --seconds", "debug nan tiny --time-limit", "confirm --time-limit", "fuzz --minutes",
    "bench kernels --arena", "bench transformer small --rope_theta", "plan . --bandwidth", "plan . --gpu-memory",
)  # fmt: skip


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "1e300", "1e9"])
def test_a_number_that_is_not_finite_or_beyond_any_clock_is_refused(option: str, value: str) -> None:
    """A comparison with NaN is false, so that it would be within every limit; clocks overflow."""
    command, _, name = option.rpartition(" ")
    result = call(*command.split(), f"{name}={value}")
    assert result.exit_code == 2
    assert result.stdout == ""
    name = name.replace("_", "[-_]")
    assert re.fullmatch(rf"error: .*{name}.*(finite number|Input should be|is not in the range).*\n", result.stderr), (
        result.stderr
    )


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
        ("verify-training nothere", "there is no directory nothere: name the output_dir of a training"),
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
    assert "against the baseline of 20250102T000000Z (Imagined CPU 9000)" in gate()
    write(reports / "runs" / "20250104T000000Z", [accuracy(), latency()])
    assert "missing: check contract test_refusal[rank]" in gate(code=1)
    other = reports / "other.json"
    kept = (reports / "baseline.json").read_text(encoding="utf-8")
    for path in (other, reports / "baseline.json"):
        path.write_text(kept.replace('"native"', '"torch_bf16"'), encoding="utf-8")
    assert "not compared with" in gate()
    gate("--baseline", other, code=1)
