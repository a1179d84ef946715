"""TP 1, 2 and 4 against the oracle and each other, forward and every gradient, each degree in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import Tensor

from ktverify.checks import tensor_parallel
from ktverify.checks.isas import Isa
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.isolation.child import ChildPool, call_fresh
from ktverify.spec.cases import Case

DEGREES = (1, 2, 4)
CASES = {
    "gaussian": "E=8,k=2,H=256,I=256,T=48,r=8,alpha=16",
    # 2 x 59 and 4 x 29.5 rows of 32: parts that are no multiple of any block
    "odd_parts": "E=5,k=3,H=97,I=236,T=33,r=5,alpha=8,routing=zipf,lora=float32",
    "decode": "E=16,k=4,H=128,I=128,T=1,r=16,alpha=32",
    "integer": "E=6,k=2,H=160,I=256,T=40,r=8,alpha=16,data=integer",
    "permuted": "E=7,k=2,H=64,I=128,T=21,r=8,alpha=8,routing=masked,map=permuted",
}


@dataclass(frozen=True)
class Failed:
    """The first degree at which a case gave no tensors, and what was raised."""

    degree: int
    error: Exception


Found = dict[str, tensor_parallel.TpResults | Failed]


def _run(target: Target, isa: Isa, fresh: int | None) -> Found:
    """name -> degree -> ALL_TENSORS, or what was raised. One fresh process for each degree computes all the cases.

    Where that fails, each case gets processes of its own, so that it costs no other.
    """
    cases = _cases(fresh)
    try:
        by_degree = {degree: _run_degree(target, isa, list(cases.values()), degree) for degree in DEGREES}
    except Exception:
        return {name: _run_alone(target, isa, case) for name, case in cases.items()}
    return {name: {degree: by_degree[degree][at] for degree in DEGREES} for at, name in enumerate(cases)}


def _run_alone(target: Target, isa: Isa, case: Case) -> tensor_parallel.TpResults | Failed:
    found: tensor_parallel.TpResults = {}
    for degree in DEGREES:
        try:
            (found[degree],) = _run_degree(target, isa, [case], degree)
        except Exception as error:
            return Failed(degree, error)
    return found


def _run_degree(target: Target, isa: Isa, cases: list[Case], degree: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = call_fresh(
        tensor_parallel.run_degree, env=isa.env, target=target, cases=cases, degree=degree
    )
    return found


def _cases(fresh: int | None) -> dict[str, Case]:
    cases = {name: Case.parse(text) for name, text in CASES.items()}
    return cases if fresh is None else {name: case.with_seed(fresh) for name, case in cases.items()}


@pytest.fixture(scope="module")
def results(isa: Isa, engine: str, fresh: int | None) -> Found:
    return _run(Target(engine, isa.name), isa, fresh)


@pytest.mark.parametrize("name", CASES)
def test_degrees_agree(
    engine: str,
    children: ChildPool,
    isa: Isa,
    results: Found,
    name: str,
    fresh: int | None,
    about: Callable[[Case, int], None],
) -> None:
    case, found = _cases(fresh)[name], results[name]
    if isinstance(found, Failed):
        about(case, found.degree)
        raise found.error
    wrong = children.get().call(
        tensor_parallel.compare_degrees,
        target=Target(engine, isa.name),
        case=case,
        found=found,
    )
    if any(line.startswith("TP ") for line in wrong):
        # against the oracle, not only one degree against another
        about(case, 1)
    if wrong:
        raise GateFailed("\n".join([case.id, *wrong]), ())
