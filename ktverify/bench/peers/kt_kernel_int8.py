"""kt-kernel 0.7.2 with INT8, which its kernel makes of the bf16 weights. A run without --peers leaves it out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "kt-kernel INT8"
BITS = 8
HELD = 2.15  # as its bf16, or less
PACKAGE, LAZY, BACKWARD, LORA, NEEDS = "kt_kernel", False, True, True, "kt_python"


def load(inputs: BenchInputs) -> Any:
    return inputs.load_module(Path(__file__).with_name("kt_kernel.py")).KtKernelPeer(inputs, "AMXINT8_SFT")
