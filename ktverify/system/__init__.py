"""The machine: processors, memory, clock, where files are; and `lazy_attribute`, which keeps packages light."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def lazy_attribute(package: str, addresses: Mapping[str, str], name: str) -> Any:
    """The attribute `name` of `package`, imported on first use. addresses: name -> "module:attribute".

    AttributeError for an unknown name."""
    if name not in addresses:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module, _, attribute = addresses[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
