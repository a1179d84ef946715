"""Codes of bf16 weights: docs/contract.md's own lines, the engine's functions and the judge's give the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.engines.quantise import codes_of
from ktverify.engines.quantised import dequantised
from ktverify.judge import dequantise
from ktverify.judge.dequantise import CODINGS, Coding, packed
from ktverify.system.files import ROOT

FORMATS = {"int8": "int8", "int4_32": "int4", "int4_128": "int4", "fp8": "fp8"}


def documented() -> dict[str, Any]:
    """The functions int8, int4 and fp8 as the contract has them, five lines each."""
    text = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    found = re.findall(r"^    def \w+\(.*\n(?:        .+\n)+", text, re.MULTILINE)
    assert [len(each.splitlines()) for each in found] == [4, 5, 5]
    names: dict[str, Any] = {"torch": torch, "pad": torch.nn.functional.pad}
    for each in found:
        exec("\n".join(line[4:] for line in each.splitlines()), names)
    return names


def by_the_document(coding: Coding, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q as fp32, W as bf16), both [N, K]."""
    lines, (rows, columns) = documented(), weight.shape
    if coding.label == "int8":
        q, s = lines["int8"](weight)
        return q, (q * s).bfloat16()
    if coding.bits == 4:
        q, s = lines["int4"](weight, coding.group)
        return q.flatten(1), (q * s).bfloat16().flatten(1)
    q, s = lines["fp8"](weight)
    whole = (each.flatten(2).flatten(0, 1)[:rows, :columns] for each in (q.float(), q.float() * s))
    plain, product = whole
    return plain, product.bfloat16()


def weight_of(rows: int, columns: int) -> Tensor:
    """bf16 of very different sizes, with rows of zeros, of the smallest numbers and of middles between codes."""
    sizes = 2.0 ** torch.randint(-20, 20, (rows, 1), generator=torch.Generator().manual_seed(3)).float()
    found = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * sizes).bfloat16()
    found[3] = 0
    found[4] = torch.arange(columns).bfloat16() * 2.0**-133
    found[5] = (torch.arange(columns) % 128 - 63.5).bfloat16()
    found[5, 0] = 127
    found[6] = (torch.arange(columns) % 8 - 3.5).bfloat16()
    found[6, ::32] = 7
    if rows > 128:
        found[128:] = (torch.arange(columns) % 448 + 0.5).bfloat16()
        found[-1, ::128] = -448
    return found


@pytest.mark.parametrize(("rows", "columns"), [(300, 256), (7, 128)])
@pytest.mark.parametrize("label", FORMATS)
def test_the_documents_lines_the_engine_and_the_judge_agree(label: str, rows: int, columns: int) -> None:
    coding, weight = CODINGS[label], weight_of(rows, columns)
    q, w = by_the_document(coding, weight)
    codes, scales = codes_of(weight, FORMATS[label], coding.group)
    judged_codes, judged_scales = dequantise.codes_of(coding, weight[None])
    assert torch.equal(codes.view(torch.uint8), packed(coding, judged_codes)[0].view(torch.uint8))
    assert scales.dtype == judged_scales.dtype
    assert torch.equal(scales, judged_scales[0])
    assert torch.equal(torch.tensor(dequantise.VALUES[coding.method])[judged_codes[0].long()], q)
    assert torch.equal(dequantised(FORMATS[label], coding.group, codes, scales, None), w)
    assert torch.equal(scales.float().isfinite(), torch.ones(scales.shape, dtype=torch.bool))
    assert w[3].count_nonzero() == 0


@pytest.mark.parametrize("columns", [131, 66])
@pytest.mark.parametrize("label", ["int8", "fp8"])
def test_edges_are_those_of_the_document(label: str, columns: int) -> None:
    coding, weight = CODINGS[label], weight_of(141, columns)
    _, w = by_the_document(coding, weight)
    assert torch.equal(dequantised(label, coding.group, *codes_of(weight, label, coding.group), None), w)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("label", FORMATS)
def test_a_number_that_is_not_finite_shows_in_the_scale(label: str, value: str) -> None:
    weight = weight_of(7, 128)
    weight[6, 127] = float(value)
    _, scales = codes_of(weight, FORMATS[label], CODINGS[label].group)
    assert not bool(scales.isfinite().all())


def test_the_weight_is_not_written_to() -> None:
    weight = weight_of(7, 128).float()
    before = weight.clone()
    for label, format in FORMATS.items():
        codes_of(weight, format, CODINGS[label].group)
    assert torch.equal(weight, before)
