"""forward, backward, AdamW, update_lora_weights: ten steps keep to the oracle's trajectory."""

from __future__ import annotations

import pytest

from ktverify.checks import trajectory
from ktverify.checks.isas import Isa
from ktverify.checks.target import Target
from ktverify.isolation.child import ChildPool
from ktverify.spec.cases import Case

TRAINED = {
    "fp32_parameters": "E=6,k=2,H=128,I=128,T=32,r=8,alpha=16,lora=float32",
    "bf16_parameters": "E=6,k=2,H=128,I=128,T=32,r=8,alpha=16",
    "odd_sizes_idle_experts": "E=9,k=3,H=97,I=46,T=24,r=3,alpha=6,routing=zipf,lora=float32",
}
UPDATED = "E=6,k=2,H=128,I=128,T=32,r=8,alpha=16"


def _case(text: str, fresh: int | None) -> Case:
    case = Case.parse(text)
    return case if fresh is None else case.with_seed(fresh)


@pytest.mark.parametrize("name", TRAINED)
def test_trajectory(engine: str, children: ChildPool, isa: Isa, name: str, fresh: int | None) -> None:
    children.get(isa.env).call(
        trajectory.check_trajectory,
        target=Target(engine, isa.name),
        case=_case(TRAINED[name], fresh),
    )


def test_trajectory_tensor_parallel(engine: str, children: ChildPool, isa: Isa, fresh: int | None) -> None:
    children.get(isa.env).call(
        trajectory.check_trajectory,
        target=Target(engine, isa.name),
        case=_case(TRAINED["fp32_parameters"], fresh),
        tp=2,
    )


def test_parameters_count_only_once_synchronised(engine: str, children: ChildPool, isa: Isa, fresh: int | None) -> None:
    children.get(isa.env).call(trajectory.check_update, target=Target(engine, isa.name), case=_case(UPDATED, fresh))


def test_backward_uses_the_weights_of_its_forward(engine: str, children: ChildPool, isa: Isa) -> None:
    children.get(isa.env).call(
        trajectory.check_update_between, target=Target(engine, isa.name), case=Case.parse(UPDATED)
    )
