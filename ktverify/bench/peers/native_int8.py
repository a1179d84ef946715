"""The native engine with base weights in INT8, a scale for each row. A run without --peers leaves it out."""

from __future__ import annotations

from ktverify.bench import coded
from ktverify.bench.peers import native

TITLE = "native INT8"
BITS = 8
HELD = BITS / 16 * native.HELD
PACKAGE, LAZY, BACKWARD, LORA, NEEDS = native.PACKAGE, native.LAZY, native.BACKWARD, native.LORA, native.NEEDS
load = coded.loader("int8", "AMXINT8_SFT")
