"""Read TOML with every supported Python."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """The document at `path`. OSError where it cannot be read, ValueError for a file that is not TOML."""
    # tomllib came with Python 3.11; tomli is the same code, and a dependency before that
    parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    document: dict[str, Any] = parser.loads(path.read_text(encoding="utf-8"))
    return document
