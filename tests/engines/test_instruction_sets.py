"""The instruction sets: Python's table is the engine's, and one is named in four files only."""

from __future__ import annotations

from ktverify import _native
from ktverify.system.files import ROOT
from ktverify.system.instruction_sets import INSTRUCTION_SETS

# what a new instruction set touches, as docs/engine.md describes it
TOUCHED = {
    "native/kernels/{}.cpp",
    "native/machine_limits/register_peaks.hpp",
    "native/src/instruction_sets.cpp",
    "ktverify/system/instruction_sets.py",
}
# they have an AVX2 path or an example of their own
OTHER_AVX2 = {
    "native/emulation/amx_tiles.cpp",
    "native/emulation/amx_tiles.hpp",
    "ktverify/checks/native_isa.py",
    "ktverify/cli/fuzz.py",
    "ktverify/engines/capabilities.py",
    "ktverify/engines/vllm_cpu.py",
    "ktverify/report/known_failures.py",
}


def test_both_tables_have_the_same_rows() -> None:
    assert _native.known_isas() == [isa.name for isa in INSTRUCTION_SETS]
    for name in _native.known_isas():
        assert (not _native.why_not(name)) == (name in _native.available_isas())


def test_an_instruction_set_is_named_in_four_files() -> None:
    name = "avx2"
    files = [path for kind in ("py", "cpp", "hpp", "inl", "txt") for path in (ROOT / "ktverify").rglob(f"*.{kind}")]
    files += [path for kind in ("cpp", "hpp", "inl", "txt") for path in (ROOT / "native").rglob(f"*.{kind}")]
    found = {
        str(path.relative_to(ROOT))
        for path in files
        if "tests" not in path.parts and name in path.read_text(encoding="utf-8").lower()
    }
    assert found - OTHER_AVX2 == {touched.format(name) for touched in TOUCHED}
