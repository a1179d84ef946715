"""Right engines that round at different points are not accused; an engine that errs by more is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ktverify.checks.problem import LiveOracle
from ktverify.checks.properties import PROPERTIES, check_property
from ktverify.checks.target import Target
from ktverify.diagnose.hypotheses.rounding import in_blocks
from ktverify.engines.registry import find
from ktverify.engines.run import run_case
from ktverify.judge.gates import Verdict, judge
from ktverify.mutants import right_engines
from ktverify.mutants.base import Plain
from ktverify.mutants.roundings import ROUNDING, engine_of
from ktverify.spec.cases import Case, catalogue
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS, OUTPUT
from tests.support.command_line import call, ends

MIDDLE = Case.parse("E=6,k=2,H=96,I=80,T=40,r=8,alpha=16,lora=float32")
# cases in which a budget made of one bf16 program's error accused a right engine
ACCUSED = [
    (
        "within_budget",
        "E=58,k=1,H=67,I=16,T=25,r=36,alpha=72,data=large,routing=uniform,lora=float32@seed=1269",
    ),
    (
        "linear_weights",
        "E=34,k=3,H=80,I=76,T=1,r=26,alpha=52,data=large,routing=uniform,lora=float32@seed=298",
    ),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_each_engine_rounds_elsewhere() -> None:
    assert len(ROUNDING) == 10
    inputs = make_inputs(MIDDLE)
    found = {name: run_case(factory, MIDDLE, inputs=inputs) for name, factory in ROUNDING.items()}
    for name in ALL_TENSORS:
        bits = {tuple(tensors[name].float().reshape(-1).tolist()) for tensors in found.values()}
        # some engines differ only in the backward
        assert len(bits) >= (7 if name == OUTPUT else 8), name
    assert not any(factory.fp32_sums for factory in ROUNDING.values())
    assert all((factory.__doc__ or "").endswith(".") for factory in ROUNDING.values())


@pytest.mark.parametrize("engine", ROUNDING)
@pytest.mark.parametrize(("name", "case"), ACCUSED, ids=[name for name, _ in ACCUSED])
def test_an_accused_engine_is_right(engine: str, name: str, case: str) -> None:
    compared, believed = check_property(Target(engine_of(engine)), name, Case.parse(case))
    assert believed > compared / 2


def test_drawn_cases_accuse_no_right_engine() -> None:
    """`python -m ktverify clean --drawn 100` draws more of them."""
    wanted = right_engines.right_engines("torch_bf16") + [
        engine for engine in right_engines.right_engines() if engine.name in map(engine_of, ROUNDING)
    ]
    assert len(wanted) == 11
    for run in right_engines.judge(3, wanted, drawn=len(PROPERTIES)):
        assert not run.bad, run.failed
        assert run.compared > 100


def test_clean_draws_cases_for_the_engines_that_match() -> None:
    done = call("clean", "--engines", "*_in_bf16,torch_bf16", "--drawn", 2, "--runs", 3, "--jobs", 1, "--seed", 5)
    ends(done, 0)
    assert done.stdout.startswith("PASS 3 of 3 runs")
    assert "2 cases that the properties draw" in done.stdout
    for engine in ("parts_in_bf16", "lora_in_bf16", "torch_bf16"):
        assert engine in done.stdout
    assert "none of native" in ends(call("clean", "--engines", "nothing"), 2)


# ---- what errs by more is found


@pytest.mark.parametrize("name", ["small", "wide_top_k", "tokens_100", "zipf"])
def test_twice_the_error_of_plain_torch_is_found(name: str) -> None:
    case = catalogue()[name]
    inputs = make_inputs(case)
    oracle, plain = LiveOracle.of(inputs), run_case(find("torch_bf16"), case, inputs=inputs)
    many = [tensor for tensor in plain if oracle.rounding[tensor].numbers >= 100]
    assert len(many) >= 8
    for tensor in many:
        right, rounding, found = oracle.tensors[tensor], oracle.rounding[tensor], plain[tensor]
        for times, verdict in ((1.0, Verdict.PASS), (2.0, Verdict.FAIL)):
            difference = oracle.compare(tensor, right + times * (found.double() - right))
            judgement = judge(case, tensor, difference, rounding)
            assert judgement.verdict is verdict, (times, judgement.line)


class _SumsInBf16(Plain):
    """Sums over H, I and r are kept in bf16 from one block of 16 to the next."""

    fp32_sums = False

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return in_blocks(a, b, 16)


def test_a_long_sum_kept_in_bf16_is_found() -> None:
    case = catalogue()["k_tail_wide"]
    inputs = make_inputs(case)
    oracle, found = LiveOracle.of(inputs), run_case(_SumsInBf16, case, inputs=inputs)
    judgement = judge(case, OUTPUT, oracle.compare(OUTPUT, found[OUTPUT]), oracle.rounding[OUTPUT])
    assert judgement.verdict is Verdict.FAIL, judgement.line
