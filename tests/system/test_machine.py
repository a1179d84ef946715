"""Facts about the machine and the sizes of a layer, from made-up files and arguments."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from ktverify.checks.target import SMALL
from ktverify.engines.argument_checks import LARGEST, LayerSpec
from ktverify.engines.run import layer_arguments
from ktverify.system.machine import Amx, isas_of, read_machine


def spec(**changed: Any) -> LayerSpec:
    return LayerSpec(**{**layer_arguments(SMALL, threads=1), **changed})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_size": LARGEST + 1}, f"hidden_size is {LARGEST + 1}; it takes .* {LARGEST}"),
        ({"num_experts": 2**31 - 1}, "num_experts is 2147483647; it takes a positive number, at most 16777216"),
        (
            {"chunked_prefill_size": LARGEST, "num_experts": 128, "num_experts_per_tok": 128},
            "chunked_prefill_size is 16777216; with num_experts_per_tok 128 it takes at most 8388608",
        ),
        ({"num_gpu_experts": 7}, r"num_gpu_experts is 7; it takes 0 to num_experts \(6\)"),
    ],
)
def test_what_would_not_be_computed_is_refused(changed: dict[str, Any], says: str) -> None:
    assert spec(moe_intermediate_size=LARGEST).moe_intermediate_size == LARGEST
    with pytest.raises(ValueError, match=says):
        spec(**changed)


def test_the_machine_tells_what_it_knows() -> None:
    here = read_machine()
    assert here.cpu
    assert here.isas[-1] == "scalar"
    assert 1 <= here.threads <= here.cpus_online
    assert 0 < here.memory_available_bytes <= here.memory_total_bytes
    assert here.versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


@pytest.mark.parametrize(
    ("lacking", "kernel", "expected"),
    [
        ("", True, ("amx_bf16", "avx512_bf16", "avx512", "avx2", "scalar")),
        ("", False, ("avx512_bf16", "avx512", "avx2", "scalar")),
        ("amx_bf16", True, ("avx512_bf16", "avx512", "avx2", "scalar")),
        ("avx512_bf16", True, ("amx_bf16", "avx512", "avx2", "scalar")),
        ("avx512f", True, ("avx2", "scalar")),
        ("fma", True, ("amx_bf16", "avx512_bf16", "scalar")),
    ],
)
def test_isas_follow_the_flags_and_the_kernel(lacking: str, kernel: bool, expected: tuple[str, ...]) -> None:
    flags = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx2", "fma"}
    amx = Amx(cpu=lacking != "amx_bf16", kernel=kernel, permitted=False, emulated=False)
    assert isas_of(frozenset(flags - {lacking}), amx) == expected
