"""The list of tests that `--quick` leaves out: how it is chosen, and that it names tests that exist."""

from __future__ import annotations

import re

import pytest

from ktverify.system.files import ROOT
from tests.support import long_tests
from tests.support.long_tests import chosen


def durations(**seconds: float) -> list[str]:
    return [f"{value:.2f}s call     tests/test_x.py::test_{name}" for name, value in seconds.items()]


CHOSEN = {
    "short": (durations(a=1.9), []),
    "long": (durations(a=2.1), ["a"]),
    "setup counts": (["1.50s setup    tests/test_x.py::test_a", "0.60s call     tests/test_x.py::test_a"], ["a"]),
    "the shortest of long rows stays": (durations(**{"a[1]": 4.0, "a[2]": 3.0}), ["a[1]"]),
    "unless it is too long": (durations(**{"a[1]": 9.0, "a[2]": 6.0}), ["a[1]", "a[2]"]),
    "short rows stay": (durations(**{"a[1]": 9.0, "a[2]": 1.0}), ["a[1]"]),
    "suites are no tests of this project": (["9.00s call     suites/x.py::test_a"], []),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_left_out(name: str) -> None:
    lines, wanted = CHOSEN[name]
    assert chosen(["some text", *lines]) == [f"tests/test_x.py::test_{each}" for each in wanted]


def test_the_list_names_tests_that_exist() -> None:
    missing = []
    for name in long_tests.names():
        path, _, test = name.partition("::")
        file = ROOT / path
        function = re.escape(test.partition("[")[0])
        if not file.is_file() or not re.search(rf"^def {function}\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            missing.append(name)
    assert missing == []
