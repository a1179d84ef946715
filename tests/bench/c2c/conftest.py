"""One pair of tiny models for all tests of the family."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktverify.bench.c2c.models import Side
from tests.support import c2c


@pytest.fixture(scope="session")
def sides() -> tuple[Side, Side]:
    """Base and teacher in fp32."""
    return c2c.sides()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Their checkpoints."""
    return c2c.checkpoints(tmp_path_factory.mktemp("pair"))
