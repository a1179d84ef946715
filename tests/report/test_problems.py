"""Failures are grouped by cause: one group for all that one defect costs, nothing left out, one command. pytest prints
of a failed test what the engine did, and of a bug in the suite all there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ktverify.errors import EngineDied, GateFailed, PropertyFailed
from ktverify.isolation.child import ChildPool
from ktverify.report import problems, tables
from ktverify.report.failure_text import text_of
from ktverify.runs.record import AccuracyRecord, AnyRecord, CheckRecord
from ktverify.spec.names import ALL_TENSORS
from tests.support.pages import markdown_rows
from tests.support.records import accuracy, write

LAST_WORDS = """load_weights_from_tensors: the engine's process died of SIGSEGV; last words:
Fatal Python error: Segmentation fault
Thread 0x00007f{number:02x} (most recent call first):"""


def dead(family: str, case: str, tensor: str, number: int) -> AccuracyRecord:
    return AccuracyRecord(
        family=family, engine="native", verdict="CRASH", case=case, tensor=tensor,
        message=LAST_WORDS.format(number=number), repro=f"python -m ktverify repro '{case}'",
    )  # fmt: skip


def dead_checks() -> list[AnyRecord]:
    """Two checks that ended in the same way, reported by the suite's own processes, and one that ended in another."""
    words = LAST_WORDS.format(number=77)
    return [
        CheckRecord(family="contract", engine="native", name="test_edge[engine-odd]", verdict="CRASH", message=words),
        CheckRecord(
            family="properties", engine="native", name="test_property[engine-split]", verdict="CRASH",
            message=f"split: rows agree\nE=1,k=1@seed=3\nEngineDied: {words}\npytest suites/properties --case E=1",
        ),
        CheckRecord(
            family="contract", engine="native", name="test_process[fork]", verdict="CRASH",
            message="checks.processes:check_fork: the process died of SIGABRT; last words:\nabort() was called",
        ),
    ]  # fmt: skip


def test_what_ended_in_the_same_way_is_one_group(tmp_path: Path) -> None:
    cases = [f"tail_h{width}@seed=0" for width in range(31)]
    records: list[AnyRecord] = [
        dead("backward", case, name, at) for at, case in enumerate(cases) for name in ALL_TENSORS
    ]
    records += [dead("forward", case, "output", at) for at, case in enumerate(cases)]
    run = write(tmp_path / "run", records + dead_checks())
    found, other = problems.problems(run)
    assert found.where == f"× {31 * 10 + 2} load_weights_from_tensors: the engine's process died of SIGSEGV"
    assert other.where == "the process died of SIGABRT"
    text = " ".join(problems.group_text(found).split())
    assert text.count("most recent call first") == 1
    assert "backward, forward: tail_h0, tail_h1," in text
    assert "contract: edge[odd]" in text
    assert "properties: property[split]" in text
    assert text.count("python -m ktverify repro") == 1
    page = tables.accuracy_markdown(run)
    assert page.count("most recent call first") == 1
    rows = markdown_rows(page, "rel-L2")
    assert {(row["case"], row["family"], row["tensor"]) for row in rows} == {
        (case, family, tensor)
        for case in cases
        for family, tensor in (("backward", "9 tensors"), ("forward", "output"))
    }


def test_failing_tensors_of_a_case_have_one_command(tmp_path: Path) -> None:
    records: list[AnyRecord] = [
        accuracy(3e-2, tensor=tensor, family=family)
        for tensor, family in (("output", "forward"), ("grad_input", "backward"), ("grad_up_lora_a", "backward"))
    ]
    (found,) = problems.problems(write(tmp_path / "run", records))
    assert found.where == "forward, backward · avx2 · small@seed=0"
    assert len(found.lines) == 3
    assert found.repro == "python -m ktverify repro 'small@seed=0' --isa avx2"


def test_cases_with_one_cause_are_one_group(tmp_path: Path) -> None:
    def wrong(case: str, cause: str, isa: str = "avx2") -> AccuracyRecord:
        record = accuracy(3e-2, case=f"{case}@seed=0", isa=isa)
        return record.model_copy(update={"message": f"{record.message}\ncause: {cause}"})

    scale = "LoRA scaling: found 1.0, expected alpha / rank = {} (explains 100.0 % of the error)"
    records: list[AnyRecord] = [wrong(f"case{n}", scale.format(n)) for n in range(2, 12)]
    records += [wrong("case2", scale.format(2), "scalar"), wrong("other", "routing weight: missing")]
    records += [wrong(name, "no hypothesis about the tensors fits; a command") for name in ("odd", "odder")]
    late = "not looked for, the search took {} s for other cases; a command '{}'"
    records += [wrong(f"late{n}", late.format(40 + n, f"late{n}")) for n in (1, 2)]
    found = problems.problems(write(tmp_path / "run", [*records[-2:], *records[:-2]]))
    assert "late1" in found[-1].where
    assert sorted(group.where for group in found) == [
        "forward · avx2 · odd@seed=0",
        "forward · avx2 · odder@seed=0",
        "forward · avx2 · other@seed=0",
        "forward · scalar · case2@seed=0",
        "× 10 cases, as forward · avx2 · case2@seed=0",
        "× 2 cases, as forward · avx2 · late1@seed=0",
    ]
    text = " ".join(problems.group_text(next(group for group in found if "10 cases" in group.where)).split())
    assert text.count("cause: LoRA scaling") == text.count("python -m ktverify repro") == 1
    assert "the same cause in case3, case4," in text


def test_checks_that_found_the_same_share_a_line(tmp_path: Path) -> None:
    def failed(name: str, message: str) -> CheckRecord:
        return CheckRecord(family="contract", engine="native", name=name, verdict="FAIL", message=message)

    records: list[AnyRecord] = [
        failed(f"test_refused[{name}]", f"{name}: was accepted") for name in ("gate_proj shape", "expert id 6")
    ]
    records += [failed("test_behaviour[engine-reload]", "the bits differ\n" + "\n".join("abcdef"))]
    (found,) = problems.problems(write(tmp_path / "run", records))
    assert found.where == "× 3 contract"
    message, names, reload, *more = found.lines
    assert message == "was accepted (2 times):"
    assert names == "  refused[gate_proj shape, expert id 6]"
    assert reload.split() == ["behaviour[reload]", "the", "bits", "differ"]
    assert [line.strip() for line in more] == ["a", "b", "c", "and 3 more lines"]


# ---- what pytest prints

REPEAT = "pytest suites/contract"


def broken_check() -> None:
    """Called in a child: a bug of the suite."""
    raise ValueError("this check is broken")


def raised_in(children: ChildPool, function: Callable[..., object], **arguments: object) -> Exception:
    with pytest.raises(Exception) as found:
        children.get().call(function, **arguments)
    return found.value


def test_a_check_is_printed_as_its_text() -> None:
    assert text_of(GateFailed("small\nFAIL output", ()), REPEAT) == f"FAIL small\nFAIL output\n{REPEAT}"
    assert text_of(PropertyFailed("case\nits own command"), REPEAT) == "case\nits own command"
    assert text_of(EngineDied("x: the process died of SIGSEGV"), REPEAT) == (
        f"CRASH x: the process died of SIGSEGV\n{REPEAT}"
    )


def test_of_an_exception_the_frames_beyond_the_suite_are_printed(children: ChildPool) -> None:
    lines = text_of(raised_in(children, json.loads, s="{"), REPEAT).splitlines()
    assert lines[0].startswith("CRASH JSONDecodeError: Expecting property name")
    assert lines[1] == "Traceback (most recent call last):"
    assert "json/__init__.py" in lines[2]
    assert not [line for line in lines if "ktverify/isolation" in line]
    assert lines[-1] == REPEAT


def test_a_bug_of_the_suite_keeps_its_traceback(children: ChildPool) -> None:
    assert text_of(raised_in(children, broken_check), REPEAT) == ""
    assert text_of(AssertionError("no check's own"), REPEAT) == ""
    assert text_of(KeyError("no engine's"), REPEAT) == ""
