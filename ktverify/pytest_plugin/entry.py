"""What an installed ktverify adds to every run of pytest: its plug-in, unless another one has options of these names.

It is added when the conftest files are loaded, so that no option of theirs finds its name taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator

import pytest

from ktverify.pytest_plugin.options import MODULE, OPTIONS

_PLUGIN = "ktverify.pytest_plugin"


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, object, object]:
    result = yield
    manager = early_config.pluginmanager
    if manager.has_plugin(_PLUGIN) or manager.is_blocked(_PLUGIN):
        return result
    known = vars(parser.parse_known_args([], argparse.Namespace()))
    taken = [name for name in OPTIONS if name[2:].replace("-", "_") in known]
    if not taken:
        manager.import_plugin(_PLUGIN)
    elif any(word.startswith(MODULE) for word in args):
        raise pytest.UsageError(
            f"another plug-in or conftest.py has {', '.join(taken)}, which {MODULE} needs: start pytest in another "
            "folder, or leave that plug-in out with -p no:NAME"
        )
    return result
