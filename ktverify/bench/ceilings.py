"""The machine's two ceilings, measured in a process of their own between the engines' turns.

Comes in: threads and an instruction set. Goes out: bytes read and operations done per second. Loaded by host.py.
"""

from __future__ import annotations

PASSES = 6
MULTIPLY_SECONDS = 0.1


def measure(threads: int, isa: str, read_bytes: int) -> dict[str, float | str]:
    """read: bytes per second; multiply: operations per second of `isa` ("" for the best that runs here), which `isa`
    tells; a multiplication and an addition are two. `read_bytes`: how much there is to read, well beyond any cache."""
    import ktverify._native as _native

    name = isa or str(_native.available_isas()[0])
    return {
        "read": float(_native.read_rate(threads, read_bytes, PASSES)),
        "multiply": float(_native.multiply_rate(name, threads, MULTIPLY_SECONDS)),
        "isa": name,
    }
