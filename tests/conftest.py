"""The project's own tests: they take the options and fixtures of the package's pytest plug-in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ktverify.isolation import host
from tests.support import long_tests

pytest_plugins = ["ktverify.pytest_plugin", "ktverify.pytest_plugin.suite"]


@pytest.fixture(autouse=True)
def _no_state_outlives_its_test() -> Iterator[None]:
    """Modules that a test loads by `host.module_at` may have imported a stand-in: the next test loads them again. What
    runs in processes of its own outside of tests sets torch's number of threads."""
    before = set(sys.modules)
    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    yield
    for name in set(sys.modules) - before:
        if name.startswith(host.HOSTED):
            del sys.modules[name]
    if threads and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


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
