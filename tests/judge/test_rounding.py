"""Errors of rounding: their formulas are the oracle's, and their size is that of a rounding to bf16."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ktverify.checks.altered_inputs import rows_of
from ktverify.judge import rounding
from ktverify.judge.gates import allowance
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward
from ktverify.judge.rounding import LEAST, MOST, draws_for, rounded_draws, rounding_error, rounding_errors
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT

MIDDLE = Case.parse("E=6,k=2,H=96,I=80,T=40,r=8,alpha=16")
KINDS = ["", "data=integer", "data=large", "data=tiny", "data=zero_b", "data=nan_row", "data=inf_row", "lora=float32"]
KINDS += ["routing=duplicate", "routing=masked", "routing=all_masked", "routing=one_expert", "T=0", "T=1,k=1,r=1"]
KINDS += ["H=1,I=1", "alpha=3"]


def case_of(changes: str) -> Case:
    fields = {"E": "5", "k": "3", "H": "33", "I": "21", "T": "9", "r": "4", "alpha": "8"}
    fields |= dict(change.split("=") for change in changes.split(",") if change)
    return Case.parse(",".join(f"{key}={value}" for key, value in fields.items()))


@pytest.mark.parametrize("changes", KINDS)
def test_the_first_draw_is_the_right_answer(changes: str) -> None:
    inputs = make_inputs(case_of(changes))
    right, drawn = forward_backward(inputs), rounded_draws(inputs, 2)
    assert tuple(sorted(drawn)) == tuple(sorted(ALL_TENSORS))
    for name, expected in right.items():
        assert drawn[name].shape == (3, *expected.shape), name
        difference = compare(drawn[name][0], expected)
        assert difference.rel_l2 < 1e-5, name
        assert (difference.non_finite, difference.missing_non_finite, difference.stray) == (0, 0, 0), name


def test_an_error_is_uniform_in_half_a_unit_and_follows_from_the_value() -> None:
    at = rounding._Rounding(4)
    value = 1 + torch.rand(200, 100, generator=torch.Generator().manual_seed(1))
    unit = 2.0**-7  # of the last of bf16's 8 bits, from 1 to 2
    error = (at(value) - value) / unit
    assert not bool(error[0].any())
    assert float(error.abs().max()) <= 0.5 + 1e-4
    for draw in error[1:]:
        assert float(draw.double().std()) == pytest.approx(12**-0.5, rel=0.01)
        assert abs(float(draw.double().mean())) < 0.01
    assert float(torch.corrcoef(error[1:].reshape(4, -1)).fill_diagonal_(0).abs().max()) < 0.03
    assert torch.equal(at(value), at(value))
    assert torch.equal(at(value.flip(0)), at(value).flip(1))
    # 2^20 times the value has 2^20 times the error's size; a bf16 number has none
    assert float((at(value * 2**20) - value * 2**20).abs().max()) == pytest.approx(2**19 * unit, rel=0.01)
    assert torch.equal(at(value.bfloat16().float())[1], value.bfloat16().float())


def test_a_product_gets_the_errors_of_its_parts() -> None:
    """Four partial sums and their sum: in the mean square, the errors of five roundings."""
    at = rounding._Rounding(64)
    a, b = torch.ones(1, 4), torch.tensor([[100.3], [-100.7], [90.1], [-89.9]])
    # each part is below 128, where bf16 has steps of 1/2; the sum is near 0
    for size in (1.0, 2.0**-60, 2.0**60):
        error = (at.product(a * size, b)[1:] - a @ b * size) / size
        assert float(error.std()) == pytest.approx((4 * 0.25 / 12) ** 0.5, rel=0.2), size


def test_numbers_are_counted() -> None:
    """As many as err on their own, however many elements repeat them."""
    generator = torch.Generator().manual_seed(3)
    right = torch.ones(1, 8, 64)
    for independent in (1, 8, 512):
        noise = torch.randn(MOST, independent, generator=generator).repeat_interleave(512 // independent, 1)
        found = rounding_error(torch.cat([right, right + 0.01 * noise.view(MOST, 8, 64)]))
        assert found.numbers == pytest.approx(independent, rel=0.6)
        assert found.rel_l2 == pytest.approx(0.01, rel=0.5 if independent == 1 else 0.2)
        assert (found.draws, found.strays) == (MOST, False)


@pytest.mark.parametrize("seed", [1016, 1018])
def test_few_numbers_that_err_are_drawn_more_often(seed: int) -> None:
    """Of integers nearly every value is a bf16 number, so that now and then one or two numbers make up all errors."""
    inputs = make_inputs(Case.parse(f"exact_wide@seed={seed}"))
    assert draws_for(inputs) == LEAST
    found = rounding_errors(inputs)
    assert min(each.numbers for each in found.values()) < 4
    assert {each.draws for each in found.values()} == {MOST}
    assert all(each.enough_draws for each in found.values())
    assert all(1 <= allowance(each) < 8.1 for each in found.values())


def test_equal_tokens_err_alike() -> None:
    """Their errors add up in a LoRA gradient, where those of different tokens average out."""
    inputs = make_inputs(Case.parse("E=1,k=1,H=48,I=40,T=64,r=4,alpha=8"))
    same = rows_of(inputs, torch.zeros(64, dtype=torch.int64))
    few, many = rounding_errors(same), rounding_errors(inputs)
    for name in GRAD_NAMES:
        assert few[name].numbers < many[name].numbers / 4, name
    alone, together = rounding_errors(rows_of(inputs, slice(0, 1)))["grad_up_lora_a"], few["grad_up_lora_a"]
    assert together.rel_l2 == pytest.approx(alone.rel_l2, rel=0.5)


def test_zeros_that_cancel_are_told_from_those_that_nothing_reaches() -> None:
    right = torch.zeros(1, 3, 4)
    right[0, 0] = 1
    idle, cancelled = right.repeat(1 + MOST, 1, 1), right.repeat(1 + MOST, 1, 1)
    idle[1:, 0] += 0.01
    cancelled[1:, :2] += 0.01
    assert not rounding_error(idle).strays
    assert rounding_error(cancelled).strays
    nothing = rounding_error(torch.zeros(1 + MOST, 3, 4))
    assert (nothing.rel_l2, nothing.numbers) == (0.0, math.inf)
    assert rounding_error(torch.cat([torch.zeros(1, 3, 4), torch.ones(MOST, 3, 4)])).rel_l2 == math.inf


def test_a_sum_that_cancels_errs_more() -> None:
    inputs = make_inputs(replace(MIDDLE, qlen=1))
    ordinary = rounding_errors(inputs)[GRAD_WEIGHTS].rel_l2
    assert 3e-3 < ordinary < 2e-2
    y = forward_backward(inputs)[OUTPUT]
    # an upstream gradient that is nearly orthogonal to the output
    upstream = inputs.grad_output.double()
    across = (upstream - y * float((y * upstream).sum() / (y * y).sum())).bfloat16()
    assert rounding_errors(replace(inputs, grad_output=across))[GRAD_WEIGHTS].rel_l2 > ordinary


def test_wide_cases_take_fewer_draws_and_come_to_the_same() -> None:
    assert draws_for(make_inputs(case_of(""))) == MOST
    wide = make_inputs(Case.parse("E=8,k=4,H=512,I=256,T=256,r=16,alpha=32"))
    assert draws_for(wide) == LEAST
    inputs = make_inputs(MIDDLE)
    for name, most in {n: rounding_error(d) for n, d in rounded_draws(inputs, MOST).items()}.items():
        least = rounding_error(rounded_draws(inputs, LEAST)[name])
        assert least.rel_l2 == pytest.approx(most.rel_l2, rel=0.15), name
        if name in (OUTPUT, GRAD_INPUT):
            assert least.numbers == pytest.approx(most.numbers, rel=0.5), name
