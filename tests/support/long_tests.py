"""The tests that `pytest --quick` leaves out: those of long_tests.txt, each of which took more than SECONDS.

The file is made from the durations of a whole run on a quiet machine:

    pytest tests/ -n 1 --durations=0 --durations-min=1 | python tests/support/long_tests.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
SECONDS = 2.0
# of a function whose every row is long, the shortest row stays if it takes no more than this
ONE_ROW = 5.0

_LINE = re.compile(r"^([\d.]+)s (?:setup|call|teardown) +(tests/\S.*)$")


def names() -> frozenset[str]:
    """The ids in the list."""
    return frozenset(LIST.read_text(encoding="utf-8").splitlines())


def chosen(lines: Iterable[str]) -> list[str]:
    """The ids to leave out, from the lines of pytest's durations."""
    seconds: dict[str, float] = {}
    for line in lines:
        if found := _LINE.match(line.rstrip()):
            seconds[found[2]] = seconds.get(found[2], 0.0) + float(found[1])
    rows: dict[str, list[str]] = {}
    for name in seconds:
        rows.setdefault(name.partition("[")[0], []).append(name)
    long = {name for name, each in seconds.items() if each > SECONDS}
    for members in rows.values():
        shortest = min(members, key=seconds.__getitem__)
        if len(members) > 1 and long.issuperset(members) and seconds[shortest] <= ONE_ROW:
            long.remove(shortest)
    return sorted(long)


if __name__ == "__main__":
    LIST.write_text("".join(f"{name}\n" for name in chosen(sys.stdin)), encoding="utf-8")
