"""Headers of safetensors files, for what writes such files tensor by tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ktverify.engines.checkpoint_files import MappedFile


def header_of(file: Path) -> dict[str, Any]:
    """dtype, shape and data_offsets of each tensor. ValueError for a file that is none of safetensors, as one that was
    cut short."""
    MappedFile(file)  # the library checks every name, size and offset
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header
