"""What torch says where memory ends, in the words of the contract."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from ktverify.errors import one_line
from ktverify.system.limits import format_bytes

# torch raises a RuntimeError for memory on the CPU
_REFUSED = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


@contextlib.contextmanager
def memory_errors(call: str) -> Iterator[None]:
    """Turn torch's errors for a tensor that does not fit into MemoryError with both amounts. call: who asked for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:  # of a GPU; its first line has both amounts
        raise MemoryError(f"{call}: {one_line(error)}") from None
    except RuntimeError as error:
        asked = _REFUSED.search(str(error))
        if asked is None:
            raise
        from ktverify import _native

        have = format_bytes(_native.available_memory())
        raise MemoryError(
            f"{call} needs {format_bytes(int(asked[1]))} for a tensor, and {have} are available; use fewer tokens per "
            "call, fewer experts, or a machine with more memory"
        ) from None
