"""Headers of safetensors files, for what writes such files tensor by tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def header_of(file: Path) -> dict[str, Any]:
    """dtype, shape and data_offsets of each tensor. ValueError for a file that is none of safetensors."""
    with file.open("rb") as stream:
        try:
            (size,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(size))
        except (struct.error, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header
