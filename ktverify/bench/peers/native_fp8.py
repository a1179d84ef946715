"""The native engine with base weights in FP8, a scale for 128 x 128. A run without --peers leaves it out."""

from __future__ import annotations

from ktverify.bench import coded
from ktverify.bench.peers import native

TITLE = "native FP8"
BITS = 8
HELD = BITS / 16 * native.HELD
PACKAGE, LAZY, BACKWARD, LORA, NEEDS = native.PACKAGE, native.LAZY, native.BACKWARD, native.LORA, native.NEEDS
load = coded.loader("fp8", "AMXFP8_SFT")
