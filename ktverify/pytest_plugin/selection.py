"""Which tests of suites/ there are: cases and instruction sets that the command line selects, and their groups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktverify.checks import isas, registry
from ktverify.pytest_plugin.options import place_of
from ktverify.runs.record import Selection
from ktverify.spec import cases
from ktverify.spec.cases import Case
from ktverify.system.files import SUITES

_FILES = {path.name: path.parent.name for path in SUITES.glob("*/test_*.py")}
FAMILIES = frozenset(_FILES.values())
ACCURACY_FAMILIES = ("forward", "backward")
# options of pytest and of this plug-in that leave tests out: as they are typed -> where pytest keeps them
_FILTERS = {
    "-k": "keyword",
    "-m": "markexpr",
    "--deselect": "deselect",
    "--ignore": "ignore",
    "--ignore-glob": "ignore_glob",
    "--last-failed": "lf",
    "--stepwise": "stepwise",
    "--maxfail": "maxfail",
    "--case": "case",
}


def family_of(item: pytest.Item | pytest.Function) -> str:
    """The folder of the suites that contains the test; "" for a test that is elsewhere."""
    return item.path.relative_to(SUITES).parts[0] if item.path.is_relative_to(SUITES) else ""


def chosen_cases(config: pytest.Config) -> list[Case]:
    """The cases that --cases and --tier select. ValueError where there are none."""
    option = config.option
    tiers = (option.tier,) if option.tier else cases.USUAL_TIERS
    chosen = [case for case in cases.select(option.cases) if case.tier in tiers]
    if not chosen:
        where = f"--cases {option.cases or '*'} in tier {' or '.join(tiers)}"
        raise ValueError(f"{where}: there is no such case; python -m ktverify list prints all")
    return chosen


def selection_of(config: pytest.Config) -> Selection:
    """What the command line asks for, so that the gate does not miss a check that nobody asked for."""
    option = config.option
    folders, rest = set[str](), list[str]()
    for argument in config.args:
        path = place_of(argument, config)
        if path.is_relative_to(SUITES) and path != SUITES:
            folders.add(path.relative_to(SUITES).parts[0])
            rest += [argument] if "::" in argument or not path.is_dir() else []
        elif SUITES.is_relative_to(path):
            folders.update(FAMILIES)
    rest += [f"{flag} {value}" for flag, name in _FILTERS.items() if (value := getattr(option, name, None))]
    return Selection(
        folders=tuple(sorted(folders)) if folders < FAMILIES else (),
        isa=option.isa,
        cases=option.cases,
        tier=option.tier,
        rest=tuple(rest),
    )


def accuracy_parameters(config: pytest.Config, family: str) -> Iterator[Any]:
    """(check, isa) for each chosen case of a family and each instruction set that it runs on."""
    planned = isas.planned(config.option.engine, config.option.isa)
    for case in chosen_cases(config):
        big = case.tier != "default"
        for isa in isas.of_tier(case.tier, planned):
            group, marks = ("big-", [pytest.mark.big]) if big else ("", [])
            check = registry.find(f"{family}/{case.name}")
            yield pytest.param(check, isa, id=f"{group}{isa.id}-{case.name}", marks=marks)


def family_in(nodeid: str) -> str:
    """The family of a test, read from its id; "" for a test that is elsewhere.

    pytest's ids are paths below its root directory. Where the suites lie outside it, as in an installed package, an id
    begins at the folder that the command line names: with a family, or, where it names a family, with the file.
    """
    *folders, file = Path(nodeid.partition("::")[0]).parts
    return _FILES.get(file, "") if not folders or folders[-1] in FAMILIES else ""


def group_of(nodeid: str) -> str:
    """The group of tests that one worker runs one after the other, read from a test's id.

    Of the suites: a family, and in it each instruction set by itself; each property, as they take longest and share
    nothing; the big cases of all families, because gigabytes of inputs are made once for forward and backward.
    Elsewhere: each file.
    """
    path, _, name = nodeid.partition("::")
    family = family_in(nodeid)
    if not family:
        return path
    if family == "properties":
        return nodeid
    found = re.search(r"\[(big|" + "|".join(isas.IDS) + r")[-\]]", name)
    if found and found.group(1) == "big":
        return "big"
    return f"{family}-{found.group(1)}" if found else f"{family}-{Path(path).name}"


def urgency(item: pytest.Item) -> tuple[int, str]:
    """Sort key: long groups first, so that no worker begins one when the others are done; timings last.

    A group begins with its first test, so one slow test takes its file to the front.
    """
    if item.get_closest_marker("big"):
        spec = getattr(item, "callspec", None)
        check = spec.params.get("check") if spec is not None else None
        return 0, check.case.name if check is not None and check.case is not None else ""
    if item.get_closest_marker("latency"):
        return 3, ""
    return (1 if item.get_closest_marker("slow") else 2), ""
