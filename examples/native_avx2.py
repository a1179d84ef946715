"""The native engine with AVX2, as an engine of the bench: `python -m ktverify bench --peers examples/native_avx2.py`.

It is timed beside the native engine with the best instruction set that runs here. The names of such a file:
ktverify/bench/peers/native.py.
"""

from __future__ import annotations

from typing import Any

from ktverify.bench.peers.native import BACKWARD, HELD, LAZY, LORA, NEEDS, PACKAGE

__all__ = ["BACKWARD", "HELD", "LAZY", "LORA", "NEEDS", "PACKAGE", "TITLE", "load"]

TITLE = "native, AVX2"


def load(inputs: Any) -> Any:
    from ktverify.experts import KTMoEWrapper

    return inputs.layer(KTMoEWrapper, isa="avx2")
