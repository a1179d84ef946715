"""Known failures: what they cover must fail, all else must pass, and the file is written from a run and read again."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ktverify.report.gate import judge_run, write_baseline
from ktverify.report.known_failures import (
    UNEXPLAINED,
    KnownFailure,
    KnownFailures,
    check_of,
    compare,
    read,
    updated,
    write,
)
from ktverify.report.tables import REFUSALS, run_verdict
from ktverify.runs import store
from ktverify.runs.record import AnyRecord, VerdictName
from ktverify.system.files import ROOT
from tests.support.command_line import call, ends
from tests.support.records import accuracy, check, latency
from tests.support.records import write as write_run

ODD = accuracy(0.5, case="odd_sizes@seed=0", tensor="grad_input", family="backward")
GOOD: list[AnyRecord] = [accuracy(), accuracy(case="tiny@seed=0"), latency(), check()]
REFUSED = "test_refused[gate_lora_b [E, r]]"


def known(*entries: KnownFailure, engine: str = "native") -> KnownFailures:
    return KnownFailures(engine, entries, "known.toml")


def entry(check: str, *case: str, isa: str = "*", verdict: VerdictName | None = None) -> KnownFailure:
    return KnownFailure(check=check, case=case or ("*",), isa=isa, verdict=verdict, reason="a reason")


def run_of(tmp_path: Path, *more: AnyRecord, exit_status: int = 1) -> store.Run:
    return write_run(tmp_path / "run", [*GOOD, *more], exit_status)


COVERING = {
    "by name": entry("backward/grad_input", "odd_sizes"),
    "by globs": entry("back*/grad_*", "odd_?izes"),
    "of any case": entry("backward/grad_input"),
    "of one of two cases": entry("backward/grad_input", "small", "odd_sizes"),
    "of an instruction set": entry("backward/grad_input", isa="avx2"),
    "of a verdict": entry("backward/grad_input", verdict="FAIL"),
}
OTHER = {
    "another tensor": entry("backward/output"),
    "another case": entry("backward/grad_input", "small"),
    "another instruction set": entry("backward/grad_input", isa="scalar"),
    "another verdict": entry("backward/grad_input", verdict="CRASH"),
    "a star that was escaped": entry(r"backward/grad_\*"),
    "a part of the name": entry("grad_input"),
}


@pytest.mark.parametrize("name", COVERING)
def test_a_known_failure_breaks_nothing(name: str, tmp_path: Path) -> None:
    found = judge_run(run_of(tmp_path, ODD), known_failures=known(COVERING[name]))
    assert (found.breaks, found.known, found.checked) == ((), 1, 5)


@pytest.mark.parametrize("name", OTHER)
def test_any_other_failure_breaks(name: str, tmp_path: Path) -> None:
    found = judge_run(run_of(tmp_path, ODD), known_failures=known(OTHER[name]))
    assert any(line.startswith("backward/avx2 odd_sizes@seed=0: FAIL") for line in found.breaks)
    assert found.known == 0


@pytest.mark.parametrize("more", [(), (ODD,)], ids=["all pass", "one of two passes"])
def test_a_known_failure_that_passes_breaks(more: tuple[AnyRecord, ...], tmp_path: Path) -> None:
    passing = accuracy(case="odd_tail@seed=0", tensor="grad_input", family="backward")
    run = run_of(tmp_path, passing, *more, exit_status=int(bool(more)))
    found = judge_run(run, known_failures=known(entry("backward/grad_input", "odd_*")))
    (line,) = found.breaks
    assert line == (
        "passes, though known.toml says that it fails: backward/grad_input odd_tail avx2 "
        "(entry backward/grad_input odd_*)"
    )


def test_an_entry_of_nothing_breaks_a_whole_run(tmp_path: Path) -> None:
    found = compare(known(entry("backward/no_such_tensor")), run_of(tmp_path, exit_status=0))
    assert found.wrong == ["known.toml: no record of this run is one of entry backward/no_such_tensor"]
    # an instruction set that this machine lacks may fail elsewhere
    elsewhere = compare(known(entry("backward/*", isa="amx_bf16")), run_of(tmp_path, exit_status=0))
    assert (elsewhere.wrong, len(elsewhere.notes)) == ([], 1)


def test_known_failures_of_another_engine_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known failures of engine other, this run is of native"):
        compare(known(engine="other"), run_of(tmp_path))


def test_the_instruction_set_is_no_part_of_a_name() -> None:
    record = check(name="test_behaviour[amx_bf16_emulated-reload]").model_copy(update={"isa": "amx_bf16 (emulated)"})
    assert check_of(record) == "contract/test_behaviour[reload]"


UPDATED: dict[str, tuple[list[AnyRecord], list[KnownFailure]]] = {
    "one check of one case": (
        [ODD, accuracy(tensor="grad_input", family="backward")],
        [entry("backward/grad_input", "odd_sizes", verdict="FAIL")],
    ),
    "every case of a check": ([ODD], [entry("backward/grad_input", verdict="FAIL")]),
    "one instruction set of two": (
        [ODD, ODD.model_copy(update={"isa": "scalar", "verdict": "PASS", "gates": accuracy().gates})],
        [entry("backward/grad_input", "odd_sizes", isa="avx2", verdict="FAIL")],
    ),
    "wild characters in a name": (
        [check("CRASH", "test_x[a*b?]")],
        [entry(r"contract/test_x[a\*b\?]", verdict="CRASH")],
    ),
}


@pytest.mark.parametrize("name", UPDATED)
def test_a_file_is_written_from_a_run(name: str, tmp_path: Path) -> None:
    more, entries = UPDATED[name]
    run = run_of(tmp_path, *more)
    found = updated(None, run)
    assert [each.model_copy(update={"reason": "a reason"}) for each in found.entries] == entries
    assert {each.reason for each in found.entries} == {UNEXPLAINED}
    write(found, tmp_path / "known.toml")
    again = read(tmp_path / "known.toml")
    assert (again.engine, again.entries) == (found.engine, found.entries)
    assert judge_run(run, known_failures=again).passed


def test_an_update_keeps_reasons_and_drops_what_passes(tmp_path: Path) -> None:
    reason = 'said "so" — twice'
    old = known(
        KnownFailure(check="backward/*", case=("odd_*",), reason=reason, link="https://host/1"),
        KnownFailure(check="forward/output", reason="passes now"),
    )
    passing = accuracy(case="odd_tail@seed=0", tensor="grad_input", family="backward")
    kept = updated(old, run_of(tmp_path, ODD))
    assert kept.entries == old.entries[:1]
    narrowed = updated(old, run_of(tmp_path, ODD, passing))
    (one,) = narrowed.entries
    assert (one.check, one.case, one.reason, one.link) == (
        "backward/grad_input",
        ("odd_sizes",),
        reason,
        "https://host/1",
    )
    write(narrowed, tmp_path / "known.toml")
    assert read(tmp_path / "known.toml").entries == narrowed.entries


def test_an_update_drops_entries_of_checks_that_there_are_no_more(tmp_path: Path) -> None:
    gone, elsewhere = entry("backward/no_such_tensor"), entry("backward/grad_input", isa="amx_bf16")
    run = run_of(tmp_path, ODD)
    kept = updated(known(gone, elsewhere), run)
    assert gone not in kept.entries
    assert elsewhere in kept.entries
    assert judge_run(run, known_failures=kept).passed


@pytest.mark.parametrize("change", [{"case": "odd_sizes@seed=7"}, {"tp": 2}], ids=["seed", "degree"])
def test_seeds_and_degrees_of_a_check_are_one(change: dict[str, object], tmp_path: Path) -> None:
    passing = accuracy(case="odd_sizes@seed=0", tensor="grad_input", family="backward").model_copy(update=change)
    run = run_of(tmp_path, ODD, passing)
    found = updated(None, run)
    assert len(found.entries) == 1
    assert judge_run(run, known_failures=found).passed


def test_no_file_is_written_from_a_run_that_did_not_finish(tmp_path: Path) -> None:
    run = run_of(tmp_path, ODD)
    assert run.head is not None
    killed = replace(run, head=run.head.model_copy(update={"finished": None}))
    with pytest.raises(ValueError, match="did not finish or has lost records"):
        updated(None, killed)


REFUSED_FILES = {
    "no TOML": ("engine = ", "Invalid value"),
    "no engine": ("[[failure]]\ncheck = 'x'\nreason = 'y'", "no engine"),
    "unknown key": ("engine = 'native'\nfailures = 1", "unknown key 'failures'"),
    "no table": ("engine = 'native'\nfailure = 'x'", "no engine, or a failure that is no"),
    "no reason": ("engine = 'native'\n[[failure]]\ncheck = 'x'", "failure 1: reason: field required"),
    "empty reason": ("engine = 'native'\n[[failure]]\ncheck = 'x'\nreason = ''", "failure 1: reason: "),
    "unknown field": ("engine = 'native'\n[[failure]]\ncheck = 'x'\nreason = 'y'\ncases = 'z'", "failure 1: cases: "),
    "unknown verdict": ("engine = 'native'\n[[failure]]\ncheck = 'x'\nreason = 'y'\nverdict = 'BAD'", "verdict"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_a_wrong_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, says = REFUSED_FILES[name]
    path = tmp_path / "known.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        read(path)
    message = str(raised.value)
    assert says in message
    assert "\n" not in message


def test_the_gate_reads_and_writes_the_file(tmp_path: Path) -> None:
    run_of(tmp_path, ODD, check("FAIL", REFUSED))
    run, path = tmp_path / "run", tmp_path / "known.toml"
    arguments = ("gate", run, "--reports", tmp_path, "--known-failures", path)
    assert "no known failures at" in ends(call(*arguments), 2)
    assert "Name it by --known-failures" in ends(call("gate", run, "--update-known-failures"), 2)
    done = call(*arguments, "--update-known-failures")
    ends(done, 0)
    assert done.stdout == f"{path}: 2 entries, 2 of them not yet explained\n"
    done = call(*arguments)
    ends(done, 0)
    assert done.stdout.startswith("PASS run: 6 checks, 2 of them known failures, without a baseline")
    # one more fault is named
    run_of(tmp_path / "new", ODD, check("FAIL", REFUSED), check("FAIL", "test_planted"))
    done = call("gate", tmp_path / "new" / "run", *arguments[2:])
    ends(done, 1)
    assert done.stdout.splitlines()[0].startswith("FAIL run: 1 broke of 7 checks, 2 of them known failures")
    assert "test_planted" in done.stdout.splitlines()[1]


def test_a_run_with_known_failures_can_be_a_baseline(tmp_path: Path) -> None:
    run, file = run_of(tmp_path, ODD), known(entry("backward/grad_input"))
    with pytest.raises(ValueError, match="does not pass"):
        write_baseline(run, tmp_path / "baseline.json")
    kept = write_baseline(run, tmp_path / "baseline.json", known_failures=file)
    assert judge_run(run, kept, known_failures=file).passed


VERDICTS: dict[str, tuple[list[AnyRecord], str]] = {
    "refusals alone": (
        [check("FAIL", REFUSED), check("FAIL", "test_refused[k 0]")],
        "Right numbers, 2 refusals missing: 2 FAIL of 6 checks.",
    ),
    "a crash at bad arguments": (
        [check("FAIL", REFUSED), check("CRASH", "test_refused[k 0]")],
        "1 CRASH, 1 FAIL of 6 checks; 1 refusal missing among them.",
    ),
    "numbers and refusals": ([ODD, check("FAIL", REFUSED)], "2 FAIL of 6 checks; 1 refusal missing among them."),
    "numbers alone": ([ODD], "1 FAIL of 5 checks."),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_report_begins_with_whether_numbers_are_wrong(name: str, tmp_path: Path) -> None:
    more, sentence = VERDICTS[name]
    assert run_verdict(run_of(tmp_path, *more)) == (False, sentence)


def test_the_suites_call_their_refusals_so() -> None:
    families = [file.parent.name for file in ROOT.glob("suites/*/*.py") if f"def {REFUSALS[:-1]}(" in file.read_text()]
    assert sorted(families) == ["contract", "quantised"]
