"""Tiny checkpoints that several tests use; each is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktverify.training.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family."""
    home = tmp_path_factory.mktemp("tiny")

    def made(family: str) -> Path:
        path = home / family
        return path if path.exists() else make_tiny(family, path)

    return made
