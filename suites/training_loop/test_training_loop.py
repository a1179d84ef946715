"""forward, backward, AdamW, update_lora_weights: ten steps keep to the oracle's trajectory."""

from __future__ import annotations

from ktverify.checks.check import Check
from ktverify.checks.isas import Isa
from ktverify.pytest_plugin.ask import Ask, each


@each("training")
def test_training_loop(ask: Ask, check: Check, isa: Isa) -> None:
    ask(check, isa)
