"""The pytest plug-in: the suites' options, and the fixtures `engine`, `target` and `case` for tests of one's own.

Light, because pytest loads it wherever ktverify is installed: what judges an engine is in suite.py, which is loaded
only where the command line asks for tests of the suites.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ktverify.pytest_plugin.options import OPTIONS, judges_an_engine

if TYPE_CHECKING:
    from ktverify.checks.target import Target
    from ktverify.spec.cases import Case

_SUITE = f"{__name__}.suite"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ktverify", "the layer under test")
    for name, how in OPTIONS.items():
        group.addoption(name, **how)


def pytest_configure(config: pytest.Config) -> None:
    for mark in (
        "big: takes gigabytes; such tests take turns, one at a time over all workers",
        "latency: measures time; never runs while another test computes",
        "slow: more than a few seconds; begins before others",
    ):
        config.addinivalue_line("markers", mark)
    if judges_an_engine(config):
        config.pluginmanager.import_plugin(_SUITE)


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> str:
    """Name of the engine under test, from --engine; a path in it is absolute."""
    from ktverify.isolation.hosted import absolute

    return absolute(pytestconfig.option.engine, pytestconfig.invocation_params.dir)


@pytest.fixture
def target(engine: str, pytestconfig: pytest.Config) -> Target:
    """The engine under test and how it is called, on the first instruction set that --isa leaves: see Target."""
    from ktverify.checks import isas
    from ktverify.checks.target import Target

    return Target(engine, isas.planned(engine, pytestconfig.option.isa)[0].name)


@pytest.fixture
def case(pytestconfig: pytest.Config) -> Case:
    """The case of --case, `small` without it."""
    from ktverify.spec.cases import Case

    return Case.parse(pytestconfig.option.case or "small")
