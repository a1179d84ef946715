"""What pytest prints of a failed test: of an engine what it did, of a bug in the suite all there is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from ktverify.errors import EngineDied, GateFailed, PropertyFailed
from ktverify.isolation.child import ChildPool
from ktverify.report.failure_text import text_of

REPEAT = "pytest suites/contract"


def broken_check() -> None:
    """Called in a child: a bug of the suite."""
    raise ValueError("this check is broken")


def raised_in(children: ChildPool, function: Callable[..., object], **arguments: object) -> Exception:
    with pytest.raises(Exception) as found:
        children.get().call(function, **arguments)
    return found.value


def test_a_check_is_told_by_its_text() -> None:
    assert text_of(GateFailed("small\nFAIL output", ()), REPEAT) == f"FAIL small\nFAIL output\n{REPEAT}"
    assert text_of(PropertyFailed("case\nits own command"), REPEAT) == "case\nits own command"
    assert text_of(EngineDied("x: the process died of SIGSEGV"), REPEAT) == (
        f"CRASH x: the process died of SIGSEGV\n{REPEAT}"
    )


def test_of_an_exception_the_frames_beyond_the_suite_are_told(children: ChildPool) -> None:
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
