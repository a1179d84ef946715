"""Edge inputs, determinism, isolation and leftovers, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ktverify.checks import behaviour
from ktverify.checks.behaviour import ODD_MIDDLE
from ktverify.checks.isas import Isa
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.child import ChildPool
from ktverify.spec.cases import Case

EDGES = {
    "no_token": "E=4,k=2,H=64,I=32,T=0,r=4,alpha=8",
    "one_token": "E=4,k=2,H=64,I=32,T=1,r=4,alpha=8",
    "multiples_of_nothing": "E=5,k=3,H=97,I=47,T=7,r=3,alpha=5",
    "multiples_of_nothing_many_rows": "E=3,k=2,H=97,I=47,T=71,r=3,alpha=5,lora=float32",
    "sizes_of_one": "E=1,k=1,H=1,I=1,T=1,r=1,alpha=1",
    "rank_above_sizes": "E=2,k=1,H=17,I=5,T=3,r=64,alpha=64",
    "one_expert_has_all": "E=6,k=2,H=96,I=64,T=50,r=8,alpha=16,routing=one_expert",
    "expert_named_twice": "E=4,k=3,H=64,I=128,T=11,r=4,alpha=8,routing=duplicate",
    "masked_slots": "E=4,k=2,H=64,I=128,T=11,r=4,alpha=8,routing=masked",
    "all_masked": "E=4,k=2,H=64,I=128,T=11,r=4,alpha=8,routing=all_masked",
    "every_expert_of_every_token": "E=5,k=5,H=64,I=32,T=18,r=2,alpha=3",
}
CHECKS = [
    "masked_weights_do_not_count",
    "odd_addresses",
    "strides",
    "repeats",
    "threads",
    "company",
    "outlier_token",
    "non_finite_isolation",
    "idle_experts",
    "nothing_is_written",
    "two_layers",
    "outstanding_forwards",
    "clear_cache",
    "varying_tokens",
    "gradient_accumulation",
    "physical_map",
    "failed_update",
    "skip_lora",
]
# more than docs/contract.md asks of every engine
OF_THE_NATIVE_ENGINE = ["reload"]
# where the point is what tails do: again with a case that is a multiple of nothing
AT_ODD_SIZES = ["nothing_is_written", "odd_addresses", "repeats", "threads", "varying_tokens"]


@pytest.mark.parametrize("name", EDGES)
def test_edge(
    engine: str, children: ChildPool, isa: Isa, name: str, fresh: int | None, about: Callable[[Case, int], None]
) -> None:
    case = Case.parse(EDGES[name])
    case = case if fresh is None else case.with_seed(fresh)
    about(case, 1)
    children.get(isa.env).call(behaviour.check_edge, target=Target(engine, isa.name), case=case)


@pytest.mark.parametrize("check", CHECKS)
def test_behaviour(engine: str, children: ChildPool, isa: Isa, check: str) -> None:
    children.get(isa.env).call(getattr(behaviour, f"check_{check}"), target=Target(engine, isa.name))


@pytest.mark.parametrize("check", OF_THE_NATIVE_ENGINE)
def test_native_behaviour(engine: str, children: ChildPool, isa: Isa, check: str) -> None:
    if engine != registry.NATIVE:
        pytest.skip("docs/contract.md does not ask this of every engine")
    children.get(isa.env).call(getattr(behaviour, f"check_{check}"), target=Target(engine, isa.name))


@pytest.mark.parametrize("check", AT_ODD_SIZES)
def test_behaviour_at_odd_sizes(engine: str, children: ChildPool, isa: Isa, check: str) -> None:
    children.get(isa.env).call(getattr(behaviour, f"check_{check}"), target=Target(engine, isa.name), case=ODD_MIDDLE)
