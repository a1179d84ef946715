"""The instruction sets that Python lists are those of the native engine."""

from __future__ import annotations

from ktverify import _native
from ktverify.system.instruction_sets import INSTRUCTION_SETS


def test_both_tables_have_the_same_rows() -> None:
    assert _native.known_isas() == [isa.name for isa in INSTRUCTION_SETS]
    for name in _native.known_isas():
        assert (not _native.why_not(name)) == (name in _native.available_isas())
