"""The machine's two ceilings, measured in a process of their own between the engines' turns.

Comes in: threads and an instruction set. Goes out: bytes read and operations done per second. Loaded by host.py.
"""

from __future__ import annotations

# well beyond any cache; each pass reads all of it
READ_BYTES = 1 << 29
PASSES = 4
MULTIPLY_SECONDS = 0.03


def measure(threads: int, isa: str) -> dict[str, float | str]:
    """read: bytes per second; multiply: operations per second of `isa` ("" for the best that runs here), which `isa`
    tells. A multiplication and an addition are two operations."""
    import ktverify._native as _native

    name = isa or str(_native.available_isas()[0])
    return {
        "read": float(_native.read_rate(threads, READ_BYTES, PASSES)),
        "multiply": float(_native.multiply_rate(name, threads, MULTIPLY_SECONDS)),
        "isa": name,
    }
