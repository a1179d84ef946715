"""The native engine with base weights in INT4, a scale for 32 in a row. A run without --peers leaves it out."""

from __future__ import annotations

from ktverify.bench import coded
from ktverify.bench.peers import native

TITLE = "native INT4"
BITS = 4
HELD = BITS / 16 * native.HELD
PACKAGE, LAZY, BACKWARD, LORA, NEEDS = native.PACKAGE, native.LAZY, native.BACKWARD, native.LORA, native.NEEDS
load = coded.loader("int4", "AMXINT4_SFT")
