"""The plug-in's options, and whether a command line asks for the suites. Light: every run of pytest imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktverify.system.files import IN_CLONE, SUITES, expand
from ktverify.system.limits import LARGEST_NUMBER

MODULE = "ktverify.suites"  # what --pyargs takes
AUTO = "auto"  # of --fresh
_LIMIT = "for one call (default: {}, of a big case {})"


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value <= LARGEST_NUMBER:
        raise ValueError(f"{text} is not above 0, and at most {LARGEST_NUMBER:.0e}")
    return value


def _seed(text: str) -> int | str:
    return text if text == AUTO else int(text)


def _path(text: str) -> Path:
    return Path(expand(text))


OPTIONS: dict[str, dict[str, Any]] = {
    "--engine": {"default": "native", "help": "name, package.module:factory or path/file.py:factory (default: native)"},
    "--isa": {"default": "all", "help": "one instruction set of the engine (default: all it can run)"},
    "--fresh": {
        "type": _seed,
        "metavar": "SEED",
        "help": "draw new inputs and compute the oracle live; auto: a random seed, which the run prints",
    },
    "--cases": {"metavar": "GLOB", "help": "only the catalogue's cases whose name matches"},
    "--tier": {
        "choices": ("default", "big", "full"),
        "help": "only the cases of one tier (default: default and big)",
    },
    "--time-limit": {"type": _above_zero, "metavar": "SECONDS", "help": _LIMIT.format(300, 900)},
    "--memory-limit": {"type": _above_zero, "metavar": "GIB", "help": f"resident, {_LIMIT.format(3, 7)}"},
    "--run-dir": {"type": _path, "help": "where the records go (default: reports/runs/<stamp>)"},
    "--case": {
        "metavar": "TEXT",
        "help": "properties: check them on this case only, 'E=2,k=1,H=3,…@seed=0'; also what the fixture `case` is",
    },
    "--sizes-of": {
        "type": int,
        "metavar": "N",
        "help": "properties: draw only sizes that are multiples of N: H, I, I / TP",
    },
    "--examples": {
        "type": int,
        "metavar": "N",
        "help": "properties: cases drawn for each property and instruction set",
    },
}


def place_of(argument: str, config: pytest.Config) -> Path:
    """The file or folder that an argument of the command line names, also as a module after --pyargs."""
    name = argument.partition("::")[0]
    if f"{name}.".startswith(f"{MODULE}."):
        return SUITES.joinpath(*name.removeprefix(MODULE).split(".")[1:])
    return (config.invocation_params.dir / name).resolve()


def judges_an_engine(config: pytest.Config) -> bool:
    """True where the command line asks for tests of the suites, so that the run leaves records.

    In a clone that is also a folder around suites/. Around an installed package it is not: pytest looks into no
    environment that lies in a project.
    """
    asked = [place_of(argument, config) for argument in config.args]
    return any(path.is_relative_to(SUITES) or (IN_CLONE and SUITES.is_relative_to(path)) for path in asked)
