"""Instruction sets of the native engine: which run here, and which one a layer takes."""

from __future__ import annotations

import os

from ktverify.engines.argument_checks import shown
from ktverify.system.machine import EMULATION_VARIABLE, emulation_hint

try:
    from ktverify import _native
except ImportError as error:  # an installation without the compiled module
    raise ImportError(
        f"ktverify's native engine is not installed ({error}); run `make setup` or `pip install .` in the repository"
    ) from error

ISA_VARIABLE = "KTVERIFY_ISA"

if os.environ.get(EMULATION_VARIABLE) == "1":
    _native.emulate_amx()


def available_isas() -> list[str]:
    """Instruction sets that this CPU, this OS and this build can run, best first."""
    return list(_native.available_isas())


def chosen_isa() -> str:
    """The instruction set of a layer without `isa`: that of the variable KTVERIFY_ISA, else the best."""
    return os.environ.get(ISA_VARIABLE) or available_isas()[0]


def amx_is_emulated() -> bool:
    """True when tile instructions run in a trap handler: results are right, times mean nothing."""
    return os.environ.get(EMULATION_VARIABLE) == "1" and bool(_native.emulate_amx())


def require_isa(isa: str) -> None:
    """ValueError for an unknown `isa`, RuntimeError where it cannot run here; for AMX, with how to emulate."""
    if not isinstance(isa, str) or isa not in _native.known_isas():
        known = ", ".join(_native.known_isas())
        raise ValueError(
            f"isa is {shown(isa)}, which is unknown; it takes one of {known}, or None for the best that runs here"
        )
    try:
        _native.require_isa(isa)
    except RuntimeError as error:
        hint = emulation_hint(available_isas()) if isa == "amx_bf16" else ""
        raise RuntimeError(f"{error}; {hint}" if hint else str(error)) from None
