"""Named ranges for Nsight, where the nvtx package is installed (`nsys profile --trace=nvtx python -m ktverify …`)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from contextlib import AbstractContextManager
from typing import Any


@functools.cache
def _annotate() -> Any:
    if importlib.util.find_spec("nvtx") is None:
        return None
    import nvtx

    return nvtx.annotate


def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """A range of this name, or nothing without the package."""
    annotate = _annotate()
    found: AbstractContextManager[Any] = contextlib.nullcontext() if annotate is None else annotate(name)
    return found
