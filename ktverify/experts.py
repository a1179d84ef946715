"""The public address of the engine: `from ktverify.experts import KTMoEWrapper`."""

from __future__ import annotations

from ktverify.engines.native.isa import amx_is_emulated, available_isas, chosen_isa
from ktverify.engines.native.layer import KTMoEWrapper

__all__ = ["KTMoEWrapper", "amx_is_emulated", "available_isas", "chosen_isa"]
