"""`confirm`: the engine's own script shows a claim of a run again, or the claim is reported as not confirmed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ktverify.checks import accuracy
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.errors import EngineOutOfMemory
from ktverify.reproducer import confirm as confirming
from ktverify.reproducer.bundle import script_of
from ktverify.reproducer.confirm import CaseRun, Claim, claims, without_claim
from ktverify.runs.record import AccuracyRecord, AnyRecord, CheckRecord
from ktverify.runs.store import load, start_run
from ktverify.spec.cases import Case
from ktverify.system.files import ROOT
from tests.support.command_line import call, ends, refused

ENGINE = "tests.support.unruly:Doubling"


def case_of(tokens: int) -> Case:
    return Case.parse(f"E=4,k=2,H=32,I=32,T={tokens},r=4,alpha=8")


def failing(tokens: int) -> list[AccuracyRecord]:
    """The records of the engine on so many tokens by the suite's own gates."""
    return accuracy.check_case(Target(ENGINE), case_of(tokens), fresh=True).records


def ended(tokens: int, verdict: str, message: str) -> CheckRecord:
    record = {"family": "contract", "engine": ENGINE, "name": "test_edge", "verdict": verdict, "message": message}
    return CheckRecord.model_validate({**record, "case": case_of(tokens).id})


def write(directory: Path, records: list[AnyRecord], engine: str = ENGINE) -> Path:
    recorder = start_run(directory, engine, "pytest")
    for record in records:
        recorder.add(record)
    return directory


def confirm(directory: Path, code: int) -> str:
    """The output of the command, which must end with this exit code."""
    return ends(call("confirm", directory), code)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script of ENGINE for one try, to be written."""
    own = replace(registry.facts(ENGINE), stand_alone=str(tmp_path / "script.py"))
    monkeypatch.setattr(registry, "facts", lambda name: own)
    monkeypatch.setattr(confirming, "TRIES", 1)
    return tmp_path / "script.py"


def rows(text: str) -> dict[str, list[str]]:
    """The table's rows by case."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line][2:]
    return {row[1]: row for row in cells}


def test_a_failure_and_a_crash_are_confirmed(tmp_path: Path) -> None:
    died = ended(13, "CRASH", "forward_sft: the engine's process died of SIGSEGV; last words:\nFatal Python error")
    raised = ended(14, "CRASH", "RuntimeError: no weights for fourteen")
    run = write(tmp_path / "run", [*failing(12), died, raised])
    text = confirm(run, 0)
    assert text.startswith(f"CONFIRMED: all 3 claims, in 3 cases of {ENGINE}.")
    failed, crashed, refused = (rows(text)[case_of(tokens).brief] for tokens in (12, 13, 14))
    assert failed[0] == "yes"
    assert failed[2:4] == ["FAIL", "output"]
    assert float(failed[4]) == pytest.approx(1.0, abs=0.05)
    assert failed[4] == failed[5]
    assert crashed == ["yes", crashed[1], "CRASH", "", "SIGSEGV", "SIGSEGV"]
    assert refused[5] == "no weights for fourteen"
    kept = run / "confirm" / crashed[1]
    assert (kept / "output.txt").read_text(encoding="utf-8").startswith("13 tokens")
    assert {path.name for path in kept.iterdir()} == {"case.safetensors", "run.py", "output.txt"}
    again = text.partition("To repeat one: the engine's Python, and ")[2].partition("\n")[0]
    assert Path(again.replace("CASE", crashed[1])).resolve() == kept.resolve() / "run.py"
    assert (run / "confirm" / "confirm.md").read_text(encoding="utf-8") == text


def test_a_claim_that_the_script_does_not_show_is_not_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirming, "TRIES", 1)
    other = CheckRecord(family="contract", engine=ENGINE, name="test_refused[k]", verdict="FAIL", message="k: accepted")
    crash = ended(10, "CRASH", "the process died of SIGABRT")
    text = confirm(write(tmp_path / "run", [*failing(11), crash, other]), 1)
    assert text.startswith("NOT CONFIRMED: 2 of 2 claims")
    assert rows(text)[case_of(11).brief][::5] == ["NO", "right"]
    assert rows(text)[case_of(10).brief][4:] == ["SIGABRT", "computed"]
    assert text.endswith("not repeated here: 1 checks.\n")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("open('/no/such/file')\n", "FileNotFoundError: [Errno 2] No such file or directory"),
        ("raise SystemExit(3)\n", "ended with exit code 3"),
        ("print('done')\n", "it ended without actual.safetensors"),
    ],
)
def test_a_script_that_fails_by_itself_shows_nothing_of_the_engine(
    tmp_path: Path, script: Path, code: str, says: str
) -> None:
    script.write_text(code, encoding="utf-8")
    died = ended(13, "CRASH", "forward_sft: the engine's process died of SIGSEGV; last words:\nFatal Python error")
    silent = ended(14, "TIMEOUT", "no answer after 60 s, ended with SIGKILL")
    text = confirm(write(tmp_path / "run", [*failing(12), died, silent]), 2)
    assert text.startswith("NOT CONFIRMED: 3 of 3 claims")
    assert "Of 3 of them nothing is known: the engine's script could not be run." in text
    for tokens in (12, 13, 14):
        row = rows(text)[case_of(tokens).brief]
        assert row[0] == "?"
        assert row[5].startswith(f"could not be run: {says}")


def test_the_same_error_in_the_script_confirms_a_crash(tmp_path: Path, script: Path) -> None:
    script.write_text("import no_such_module\n", encoding="utf-8")
    same = ended(13, "CRASH", "CRASH forward_sft: ModuleNotFoundError: No module named 'no_such_module' (engine.py:7)")
    other = ended(14, "CRASH", "CRASH forward_sft: ModuleNotFoundError: No module named 'another' (engine.py:7)")
    text = confirm(write(tmp_path / "run", [same, other]), 2)
    assert [rows(text)[case_of(tokens).brief][0] for tokens in (13, 14)] == ["yes", "?"]


@pytest.mark.parametrize(
    ("message", "ended", "same"),
    [
        ("forward_sft: the process ended with exit code 127", "ended with exit code 1", False),
        ("forward_sft: the process ended with exit code 1", "ended with exit code 127", False),
        ("forward_sft: the process ended with exit code 3; last words:\n13 tokens", "ended with exit code 3", True),
        ("CRASH forward_sft: SystemExit: 3 (engine.py:7)", "ended with exit code 3", True),
        ("CRASH forward_sft: AssertionError: rows differ (engine.py:7)", "AssertionError", False),
        ("CRASH forward_sft: AssertionError: rows differ (engine.py:7)", "AssertionError: rows", False),
        ("CRASH forward_sft: AssertionError: rows differ (engine.py:7)", "my.Own.AssertionError: rows differ", True),
        ("CRASH forward_sft: the engine's process is gone", "e", False),
        ("RuntimeError: no weights for fourteen", "fourteen", False),
        ("CRASH forward_sft: SystemExit: no weights (engine.py:7)", "no weights", True),
    ],
)
def test_only_the_same_end_is_confirmed(message: str, ended: str, same: bool) -> None:
    claim = Claim(CaseRun(case_of(13).id), "CRASH", "", "CRASH", message=message)
    assert confirming._same_end(claim, ended) is same


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("13 tokens\n", "13 tokens"),
        (
            "a\nTraceback (most recent call last):\n  File ...\n    f()\nValueError: two\n  lines\n",
            "ValueError: two lines",
        ),
        ("", ""),
    ],
)
def test_the_error_that_an_output_ends_with(said: str, error: str) -> None:
    assert confirming._error_in(said) == error


def test_no_answer_confirms_a_timeout(tmp_path: Path) -> None:
    # starting Python takes longer than that
    run = write(tmp_path / "run", [ended(12, "TIMEOUT", "no answer after 60 s, ended with SIGKILL")])
    found = confirming.confirm(load(run), time_limit=0.01, done=lambda number, of: None)
    assert [(each.confirmed, each.script) for each in found] == [(True, "no answer")]


def test_a_run_without_claims_needs_no_script(tmp_path: Path) -> None:
    for engine in (ENGINE, "torch_bf16"):
        assert confirm(write(tmp_path / engine, [], engine), 0).startswith("Nothing to confirm")


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ("torch_bf16", "engine 'torch_bf16' has no stand-alone script; it takes the attribute stand_alone"),
        ("tests.support.unruly:NoFile", "stand_alone is '/no/such/run.py', which is no file"),
    ],
)
def test_an_engine_without_a_script_is_refused_in_one_line(tmp_path: Path, engine: str, says: str) -> None:
    refused(call("confirm", write(tmp_path / "run", [ended(12, "CRASH", "it raised")], engine)), says)


def test_the_script_of_kt_kernel_imports_nothing_of_ktverify() -> None:
    lines = script_of("kt_kernel").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith(("import ktverify", "from ktverify"))]


def test_each_claim_is_reported_once() -> None:
    case = "exact_small@seed=0"
    lines = ["TP 1: FAIL grad_input non_finite 96, budget 0, worst [0, 0]", "TP 2: FAIL output 3 of 8 elements differ"]
    said = "\n  ".join([case, *lines])
    degrees = CheckRecord(
        family="tp_consistency", engine=ENGINE, name="test_degrees", verdict="FAIL", message=said, case=case
    )
    own = "\n".join([case, *(line.partition(": ")[2] for line in lines)])
    exact = degrees.model_copy(update={"family": "exact", "message": own})
    assert claims([degrees, degrees]) == [
        Claim(CaseRun(case, 1), "FAIL", "grad_input", "96 not finite"),
        Claim(CaseRun(case, 2), "FAIL", "output", "3 of 8 elements differ"),
    ]
    found = [(claim.where.tp, claim.tensor, claim.exact) for claim in claims([exact])]
    assert found == [(1, "output", True), (1, "grad_input", True)]
    nameless = degrees.model_copy(update={"case": ""})
    eaten = degrees.model_copy(update={"verdict": "OOM"})
    assert claims([nameless, eaten]) == []
    assert without_claim([degrees, nameless, eaten]) == 2


def test_too_much_memory_is_said_to_be_left_out_and_why(tmp_path: Path) -> None:
    error = EngineOutOfMemory("judge_family, in load_weights_from_tensors: 7.1 GiB were resident; last words:\nmine.py")
    big = Case.parse("E=256,k=8,H=7168,I=2048,T=4,r=16,alpha=32")
    described = accuracy.of_weights(error, big)
    assert "256 experts of 88 MB, 22.5 GB in all, and its tokens reach at most 32 of them" in str(described)
    assert f'"{accuracy.IDLE_EXPERTS}"; last words:\nmine.py' in str(described)
    assert accuracy.IDLE_EXPERTS in (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    lost = accuracy.lost(described, ("output",), Target(ENGINE), big)
    text = confirm(write(tmp_path / "run", [*lost]), 0)
    assert text.startswith("Nothing was confirmed: a script can show none of the 1 failures of run.")
    assert f"OOM, and not repeated here because a script has no memory limit: 1 records of {big.brief}." in text
    assert f"The numbers, without a limit: python -m ktverify repro '{big.id}' --engine {ENGINE}" in text
