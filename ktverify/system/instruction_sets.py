"""The instruction sets of the native engine, as Python needs them: one row each, best first.

The engine's own table, with kernels and requirements, is native/src/instruction_sets.cpp; a test compares the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class InstructionSet:
    """name: as `isa=` takes it. cpu_flags: what /proc/cpuinfo lists on a CPU that has it. peer_variables: environment
    variables that hold oneDNN, kt-kernel and ATen to it, so that the bench compares like with like."""

    name: str
    cpu_flags: tuple[str, ...] = ()
    peer_variables: Mapping[str, str] = field(default_factory=dict)


AMX = "amx_bf16"
AVX512_BF16 = "avx512_bf16"
AVX512 = "avx512"
SCALAR = "scalar"
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")

INSTRUCTION_SETS = (
    InstructionSet(AMX, ("amx_tile", "amx_bf16", *_AVX512)),
    InstructionSet(
        AVX512_BF16,
        (*_AVX512, "avx512_bf16"),
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "KT_KERNEL_CPU_VARIANT": "avx512_bf16"},
    ),
    InstructionSet(AVX512, (*_AVX512, "fma"), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    InstructionSet(
        "avx2",
        ("avx2", "fma"),
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "KT_KERNEL_CPU_VARIANT": "avx2", "ATEN_CPU_CAPABILITY": "avx2"},
    ),
    InstructionSet(SCALAR),
)
ISA_FLAGS = {isa.name: isa.cpu_flags for isa in INSTRUCTION_SETS}
# Operations per cycle of a CPU with such a flag or instruction set, over one without any.
PEAKS = {"": 1, "avx2": 4, "avx512f": 8, AVX512: 8, AVX512_BF16: 16, AMX: 128}
