"""What the engine claims or disclaims in ktverify.toml or by its attributes: a test for each claim."""

from __future__ import annotations

import pytest

from ktverify.engines.capabilities import Capability
from ktverify.pytest_plugin.ask import Ask


def test_claim(ask: Ask, claim: Capability | None) -> None:
    if claim is None:
        pytest.skip("the engine declares no capabilities")
    ask.claim(claim)
