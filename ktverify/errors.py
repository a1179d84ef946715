"""What an engine says that it cannot do, on its way to the report."""

from __future__ import annotations


class Unsupported(NotImplementedError):
    """The engine raised NotImplementedError in a call that was to be right: its reason. A skip, never a pass."""
