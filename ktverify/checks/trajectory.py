"""Some optimizer steps through an engine, beside the same steps through the oracle.

Loss: 0.5 ||output - goal||^2, so grad_output = output - goal; AdamW steps layer.gate_lora_a … layer.down_lora_b.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.check import Check, enter
from ktverify.checks.judging import BUDGET, NUMBERS, expect_forms, judged
from ktverify.checks.target import Target, expect
from ktverify.engines.run import backward_of, forward, run_layer
from ktverify.errors import GateFailed
from ktverify.judge import gates, reference
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import LORA_NAMES, OUTPUT

STEPS = 10
LEARNING_RATE = 1e-2

# output of the present parameters; the six gradients for a grad_output
Forward = Callable[[], Tensor]
Backward = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Trajectory:
    """losses: one per step, before it is taken, and one after the last; parameters: by LORA_NAMES, after the last."""

    losses: list[float]
    parameters: dict[str, Tensor]
    start: dict[str, Tensor]


@dataclass(frozen=True)
class Drift:
    """How far a trajectory is from the oracle's; no unit.

    loss: the largest |L - L_oracle| / L_oracle over the steps. parameters: ||p - p_oracle|| / ||p_oracle - p_start|| by
    name, so that a parameter that hardly moves has to move right all the same.
    """

    loss: float
    parameters: dict[str, float]


def goal_of(case: Case) -> Tensor:
    """[T, H] bf16: what the oracle gives with other LoRA weights, so that the loss can be lowered."""
    inputs = make_inputs(case)
    other = make_inputs(case.with_seed(case.seed + 1))
    teacher = copy.copy(inputs)
    teacher.lora = other.lora
    return reference.forward_backward(teacher, backward=False)[OUTPUT].to(torch.bfloat16)


def train(
    parameters: dict[str, Tensor], goal: Tensor, forward: Forward, backward: Backward, update: Callable[[], None]
) -> Trajectory:
    """STEPS steps of AdamW on `parameters`, in place."""
    start = {name: tensor.detach().double().clone() for name, tensor in parameters.items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        error = forward().double() - goal.double()
        losses.append(0.5 * float((error * error).sum()))
        gradients = backward(error.to(torch.bfloat16))
        for name, parameter in parameters.items():
            parameter.grad = gradients[f"grad_{name}"].to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        update()
    error = forward().double() - goal.double()
    losses.append(0.5 * float((error * error).sum()))
    return Trajectory(losses, {name: tensor.detach().clone() for name, tensor in parameters.items()}, start)


def oracle_trajectory(case: Case, goal: Tensor) -> Trajectory:
    """The steps with fp64 outputs and gradients; the parameters keep the case's dtype, as the engine's do."""
    inputs = make_inputs(case)

    def forward() -> Tensor:
        return reference.forward_backward(inputs, backward=False)[OUTPUT]

    def backward(grad_output: Tensor) -> dict[str, Tensor]:
        inputs.grad_output = grad_output
        return reference.forward_backward(inputs)

    return train(inputs.lora, goal, forward, backward, lambda: None)


def engine_trajectory(target: Target, case: Case, goal: Tensor) -> Trajectory:
    """The steps through forward_sft, backward and update_lora_weights."""
    inputs = make_inputs(case)
    layer = target.layer(case, inputs)

    def output() -> Tensor:
        # the last loss of the trajectory needs no backward, so nothing may be left outstanding by this
        return forward(layer, inputs, save=False)

    earlier: dict[str, Tensor] = {}

    def backward(grad_output: Tensor) -> dict[str, Tensor]:
        nonlocal earlier
        saved = forward(layer, inputs, save=True)
        inputs.grad_output = grad_output
        found = {OUTPUT: saved, **backward_of(layer, inputs)}
        before = earlier | {name: getattr(layer, name).detach() for name in LORA_NAMES}
        expect_forms(target, f"{case.id}, a step of {STEPS}", found, inputs, before)
        earlier = found
        return found

    parameters = {name: getattr(layer, name) for name in LORA_NAMES}
    return train(parameters, goal, output, backward, layer.update_lora_weights)


def drift(found: Trajectory, oracle: Trajectory) -> Drift:
    """How far `found` is from `oracle`; see Drift."""
    loss = max(abs(a - b) / b for a, b in zip(found.losses, oracle.losses, strict=True))
    parameters = {}
    for name, expected in oracle.parameters.items():
        moved = torch.linalg.vector_norm(expected.double() - oracle.start[name])
        apart = torch.linalg.vector_norm(found.parameters[name].double() - expected.double())
        parameters[name] = float(apart / moved)
    return Drift(loss, parameters)


@functools.lru_cache(maxsize=8)
def _beside(case: Case) -> tuple[Tensor, Trajectory, Drift]:
    """What every engine is held against: the goal, the oracle's steps, and how far plain bf16 torch is from them."""
    goal = goal_of(case)
    oracle = oracle_trajectory(case, goal)
    return goal, oracle, drift(engine_trajectory(Target("torch_bf16"), case, goal), oracle)


def check_trajectory(target: Target, case: Case) -> dict[str, float]:
    """GateFailed unless losses and parameters keep to the oracle's as well as plain torch in bf16 does.

    Returns the share of its budget that each used, by name ("loss" and LORA_NAMES).
    """
    goal, oracle, plain = _beside(case)
    found = engine_trajectory(target, case, goal)
    # a trajectory that goes nowhere would agree with anything
    learns = oracle.losses[-1] < gates.tolerances()["training"]["learns"] * oracle.losses[0]
    expect(learns, f"the oracle learns nothing: {oracle.losses}")
    return within_budgets(f"{case.id}, {STEPS} steps, TP {target.tp}", drift(found, oracle), plain, target.gates_off)


def within_budgets(what: str, own: Drift, plain: Drift, gates_off: frozenset[str] = gates.ALL_ON) -> dict[str, float]:
    """The share of its budget that each of `own` uses, by name; GateFailed with `what` if one uses more than all."""
    numbers = gates.tolerances()["training"]
    used, wrong, exceeded = {}, [], []
    for name, value, drifted, floor in [
        ("loss", own.loss, plain.loss, numbers["loss_floor"]),
        *[(name, own.parameters[name], plain.parameters[name], numbers["parameter_floor"]) for name in LORA_NAMES],
    ]:
        budget = min(numbers["cap"], max(numbers["factor"] * drifted, floor))
        used[name] = value / budget
        # NaN is over every budget
        if "loss" not in gates_off and not value <= budget:
            exceeded.append(("loss", used[name]))
            wrong.append(f"FAIL {name} drift {value:.1e}, budget {budget:.1e} ({used[name]:.0%})".replace("%", " %"))
    if wrong:
        raise GateFailed("\n".join([what, *wrong]), tuple(exceeded))
    return used


def check_update(target: Target, case: Case) -> None:
    """AssertionError unless the engine computes with the values of the last update_lora_weights, all six alike."""
    inputs, other = make_inputs(case), make_inputs(case.with_seed(case.seed + 1))
    layer = target.layer(case, inputs)
    before = run_layer(layer, inputs)

    def change(names: tuple[str, ...]) -> None:
        with torch.no_grad():
            for name in names:
                getattr(layer, name).copy_(other.lora[name])
                inputs.lora[name] = other.lora[name]

    # gate first, the rest later: a mixture of old and new must never be computed with
    half, rest = LORA_NAMES[:3], LORA_NAMES[3:]
    change(half)
    target.expect_same_bits("parameters changed, no update_lora_weights", before, run_layer(layer, inputs))
    layer.update_lora_weights()
    after_half = run_layer(layer, inputs)
    judged(target, "three parameters changed, then update_lora_weights", case, after_half, inputs)
    change(rest)
    target.expect_same_bits("the other three changed, no update_lora_weights", after_half, run_layer(layer, inputs))
    layer.update_lora_weights()
    judged(target, "all parameters changed, then update_lora_weights", case, run_layer(layer, inputs), inputs)


def check_update_between(target: Target, case: Case) -> None:
    """AssertionError unless a forward's gradients are those of the weights that it was computed with."""
    inputs = make_inputs(case)
    expected = target.run(case, inputs)
    layer = target.layer(case, inputs)
    forward(layer, inputs, save=True)
    with torch.no_grad():
        for name in LORA_NAMES:
            getattr(layer, name).mul_(-3)
    found = backward_of(layer, inputs)
    target.expect_same_bits("parameters changed between forward and backward", expected, found, tuple(found))


UPDATE = (
    "takes all six parameters over at once. Until then the layer computes with the values of the last update; a "
    "waiting backward keeps those of its forward"
)
TRAINED = {
    "fp32_parameters": "E=6,k=2,H=128,I=128,T=32,r=8,alpha=16,lora=float32",
    "bf16_parameters": "E=6,k=2,H=128,I=128,T=32,r=8,alpha=16",
    "odd_sizes_idle_experts": "E=9,k=3,H=97,I=46,T=24,r=3,alpha=6,routing=zipf,lora=float32",
}
_UPDATED = Case.parse(TRAINED["bf16_parameters"])
_FP32 = Case.parse(TRAINED["fp32_parameters"])


def _check(
    name: str, function: Callable[..., object], contract: str, gates: tuple[str, ...], case: Case, **more: Any
) -> Check:
    return Check(f"training/{name}", "training_loop", function, contract, gates, Cause.STALE_LORA, case=case, **more)


enter(
    [
        *(_check(name, check_trajectory, BUDGET, ("loss", "form"), Case.parse(text)) for name, text in TRAINED.items()),
        _check("tp", check_trajectory, BUDGET, ("loss", "form"), _FP32, tp=(2,)),
        _check("update", check_update, UPDATE, (*NUMBERS, "bits", "form"), _UPDATED),
        _check("update_between", check_update_between, UPDATE, ("bits",), _UPDATED),
    ]
)
