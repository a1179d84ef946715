"""Measure the machine's two ceilings: memory bandwidth and matrix products. host.py loads this file as an engine."""

from __future__ import annotations

# short, because the best of many rounds counts: a pass for each of the three ways to read
PASSES = 3
MULTIPLY_SECONDS = 0.03


def measure(threads: int, isa: str, read_bytes: int) -> dict[str, float | str]:
    """Measure read (bytes per second) and multiply (operations per second), and return them with the isa.

    isa: "" for the best that runs here. A multiplication and an addition are two operations. read_bytes: size of the
    memory to read, well beyond any cache.
    """
    import ktverify._native as _native

    name = isa or str(_native.available_isas()[0])
    return {
        "read": float(_native.read_rate(threads, read_bytes, PASSES)),
        "multiply": float(_native.multiply_rate(name, threads, MULTIPLY_SECONDS)),
        "isa": name,
    }
