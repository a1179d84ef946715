"""Arguments of a constructor: of every wrong kind, one line that names the argument, and the class of the contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from ktverify.engines import registry
from ktverify.engines.run import layer_arguments
from ktverify.spec.cases import Case

CASE = Case.parse("E=5,k=2,H=97,I=46,T=9,r=3,alpha=6")
COUNTS = (
    *("num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size", "cpuinfer_threads"),
    *("threadpool_count", "chunked_prefill_size", "lora_rank", "max_cache_depth"),
)


class Odd:
    """An object of two lines."""

    def __repr__(self) -> str:
        return "first\nsecond"


class Unprintable:
    """An object that cannot be printed, of a class whose name has two lines."""

    def __repr__(self) -> str:
        raise RuntimeError("first\nsecond")


Unprintable.__name__ = "Größe\n2"


KINDS: tuple[Any, ...] = ("8", True, 8.0, math.nan, None, [], {}, np.int64(8), np.float32(8), Odd(), 8j, b"8")
KINDS += (Unprintable(), np.bool_(True), torch.tensor(8), torch.zeros(9, 99), Decimal(8), iter([8]), [8] * 10**5)
HUGE = (10**400, -(10**400), 10**5000, 1 << 63)


def rows(error: type[Exception], names: Sequence[str], values: Sequence[Any]) -> list[tuple[str, Any, type[Exception]]]:
    return [(name, value, error) for name in names for value in values]


ROWS = [
    *rows(TypeError, (*COUNTS, "layer_idx", "num_gpu_experts"), KINDS),
    *rows(ValueError, COUNTS, (*HUGE, 0, -1)),
    *rows(ValueError, ("layer_idx", "num_gpu_experts"), (*HUGE, -1)),
    *rows(TypeError, ("lora_alpha",), ("32", True, None, [], np.float32(32), np.int64(32), Fraction(1, 2), 8j, Odd())),
    *rows(TypeError, ("lora_alpha", "lora_dropout"), (Unprintable(), np.bool_(True), torch.tensor(0.5), "\ud800")),
    *rows(ValueError, ("lora_alpha",), (*HUGE[:3], 1e308, 1e-300, 5e-324, 2e39, 3e-38, 0, -1.0, -0.0)),
    *rows(ValueError, ("lora_alpha",), (math.nan, math.inf, -math.inf)),
    *rows(TypeError, ("lora_dropout",), ("0", True, False, None, [], np.float32(0))),
    *rows(ValueError, ("lora_dropout",), (*HUGE, 1, 1.0, -0.1, math.nan, math.inf)),
    *rows(ValueError, ("method", "mode"), ([], {}, 7, None, "", "x" * 900, "\ud800\x1b\0", b"", True, ("sft",))),
    *rows(ValueError, ("method", "mode"), (Unprintable(), torch.zeros(2), math.nan)),
    *rows(
        ValueError, ("gpu_device",), ("", "gpu", "cuda:x", "cuda:-1", "meta", "a\0b", "\ud800", "\x1b[31m", "x" * 900)
    ),
    *rows(TypeError, ("gpu_device",), (0, None, torch.device("cpu"), Unprintable(), [])),
    *rows(TypeError, ("numa_nodes", "gpu_experts_mask"), (7, "0", {0}, [0.0], [None], Unprintable(), [Odd()])),
    *rows(ValueError, ("mode",), (np.array(["sft", "x"]),)),
    *rows(TypeError, ("weight_path",), (7, None, [], b"x", True)),
]
ISA: list[Any] = [7, 0, False, "", [], "avx3", "AVX2", b"avx2", "\ud800", np.str_("nothing"), 10**5000]


def _expect(error: Exception, name: str, wanted: type[Exception]) -> None:
    text = str(error)
    assert type(error) is wanted, text
    assert text.startswith(f"{name} is "), text
    assert text.isascii(), text
    assert text.isprintable(), text
    assert len(text) < 300, text


@pytest.mark.parametrize("engine", ["native", "torch_bf16"])
def test_a_wrong_argument_is_one_line(engine: str) -> None:
    factory = registry.find(engine)
    for name, value, wanted in ROWS:
        with pytest.raises(Exception) as caught:
            factory(**layer_arguments(CASE, **{name: value}))
        _expect(caught.value, name, wanted)


def test_a_wrong_instruction_set_is_one_line() -> None:
    for value in ISA:
        with pytest.raises(Exception) as caught:
            registry.find("native")(**{**layer_arguments(CASE), "isa": value})
        _expect(caught.value, "isa", ValueError)


@pytest.mark.parametrize("alpha", [6, 6.0, np.float64(6), 3 * 2.0**-126, 1e38, 10**38])
def test_every_scaling_that_is_normal_in_fp32_is_taken(alpha: Any) -> None:
    layer: Any = registry.find("native")(**layer_arguments(CASE, lora_alpha=alpha))
    scaling = np.float32(layer.spec.scaling)
    assert np.finfo(np.float32).tiny <= scaling <= np.finfo(np.float32).max
