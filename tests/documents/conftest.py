"""kt-kernel's names for the tests of this folder, taken away after each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def kt_kernel_names() -> Iterator[None]:
    importlib.import_module("ktverify.as_kt_kernel").install()
    yield
    for name in [name for name, module in sys.modules.items() if "__ktverify__" in getattr(module, "__dict__", ())]:
        del sys.modules[name]
