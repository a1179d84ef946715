"""A training, step by step: forward, backward, AdamW and update_lora_weights, each step judged against the oracle."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ktverify.checks.accuracy import facts, wrong_form
from ktverify.checks.judging import arguments_of, wrong_forms
from ktverify.checks.problem import LiveOracle
from ktverify.checks.repro_commands import isa_name, verify_command
from ktverify.checks.target import Target
from ktverify.engines.run import build_layer, forward, run_layer
from ktverify.isolation.calls import IMPORT, call_of
from ktverify.judge.gates import judge
from ktverify.runs.record import AccuracyRecord, accuracy_record, worst_first
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_NAMES, LORA_NAMES

TRAINING_STEPS = 10
LEARNING_RATE = 1e-3


def check_training(
    target: Target, case: Case, *, steps: int = TRAINING_STEPS, learning_rate: float = LEARNING_RATE
) -> Iterator[tuple[float, list[AccuracyRecord]]]:
    """Forward, backward, AdamW and update_lora_weights, `steps` times; yields each step's loss and records.

    The loss is half the mean squared distance of the output from a fixed goal. In each step the oracle gets the
    parameters that the optimizer left and the engine's upstream gradient, so that the budgets of a single call hold for
    every step and an engine that goes on with old weights is off by the whole update. Judged by the budgets of every
    engine: the limits of the project's own engine, and the bits of an integer case, are agreed for the inputs of the
    catalogue, and after a step parameters and upstream gradient are others.
    """
    with call_of(IMPORT):
        factory = target.factory
    inputs = make_inputs(case)
    goal = inputs.grad_output.float()
    layer = build_layer(factory, case, inputs, isa=target.isa, tp=target.tp, threads=target.threads)
    with call_of("parameters"):
        parameters = [getattr(layer, name) for name in LORA_NAMES]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    earlier: dict[str, torch.Tensor] = {}
    for step in range(steps):
        started = time.perf_counter()
        with call_of("parameters"):
            lora = {name: getattr(layer, name).detach().clone() for name in LORA_NAMES}
        output = forward(layer, inputs, save=False)
        distance = output.float() - goal
        # AdamW divides every gradient by its own size, so the mean's constant factor may be left out of the gradient
        loss = 0.5 * float(distance.square().mean())
        upstream = distance.to(torch.bfloat16)
        here = replace(inputs, lora=lora, grad_output=upstream)
        found = run_layer(layer, here)
        own = {name: getattr(layer, name).detach() for name in LORA_NAMES}
        before = {f"the step before's {name}": tensor for name, tensor in earlier.items()}
        forms = wrong_forms(case, found, {**arguments_of(here), **own, **before})
        earlier, actual = found, {name: tensor.detach().clone() for name, tensor in found.items()}
        expected = LiveOracle.of(here)
        records = []
        for name in ALL_TENSORS:
            about: dict[str, Any] = {**facts(target, name), "family": "training", "source": f"step {step + 1}"}
            about |= {"duration_s": time.perf_counter() - started, "repro": verify_command(target, case)}
            if name in forms:
                records.append(wrong_form(name, forms[name], {"case": case, **about}))
                continue
            difference = expected.compare(name, actual[name])
            judgement = judge(case, name, difference, expected.rounding[name], isa=isa_name(target.label))
            records.append(accuracy_record(judgement, difference, case=case, **about))
        yield loss, records
        for parameter, name in zip(parameters, GRAD_NAMES, strict=True):
            parameter.grad = actual[name].to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        with call_of("update_lora_weights"):
            layer.update_lora_weights()


def loss_problem(losses: Sequence[float]) -> str:
    """What is wrong with the losses of a training, "" if nothing: they must be finite, and end below their start."""
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss}"
    if len(losses) < 2 or losses[-1] >= losses[0]:
        return f"the loss does not fall: {losses[0]:.6g} at first, {losses[-1]:.6g} in the end"
    return ""


def worst_of_steps(steps: Sequence[Sequence[AccuracyRecord]]) -> list[AccuracyRecord]:
    """For each tensor the record of the step that did worst, in the contract's order."""
    worst: dict[str, AccuracyRecord] = {}
    for record in worst_first([record for records in steps for record in records]):
        assert isinstance(record, AccuracyRecord)
        worst.setdefault(record.tensor, record)
    return [worst[name] for name in ALL_TENSORS if name in worst]
