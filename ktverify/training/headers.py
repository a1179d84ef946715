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


def shapes_in(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor in the safetensors files of a folder. ValueError as `header_of`."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: about["shape"] for file in files for name, about in header_of(file).items()}
