"""The project's own tests: they take the options and fixtures of the package's pytest plug-in."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from ktverify.isolation import host
from tests.support import long_tests

pytest_plugins = ["ktverify.pytest_plugin", "ktverify.pytest_plugin.suite"]


@pytest.fixture(autouse=True)
def _hosted_modules_end_with_their_test() -> Iterator[None]:
    """A module that a test loads by `host.module_at` may have imported a stand-in; the next test loads it again."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(host.HOSTED):
            del sys.modules[name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help=f"leave out this project's tests of more than {long_tests.SECONDS:g} s"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    long = long_tests.names()
    left_out = [item for item in items if item.nodeid in long]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid not in long]
