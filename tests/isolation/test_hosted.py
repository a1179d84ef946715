"""Hosted engines: the same bits and errors as in this process, shared parameters, and crashes that stay there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ktverify.checks.target import ODD, SMALL, expect_same_bits, same_bits
from ktverify.engines.run import build_layer, layer_arguments, run_layer
from ktverify.engines.torch_bf16 import TorchBf16
from ktverify.errors import EngineDied, GateFailed
from ktverify.isolation.hosted import Hosted, seen
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import LORA_NAMES

# one process for all tests of this file: it takes seconds to start
ENGINE = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
from ktverify.engines.torch_bf16 import TorchBf16

class Engine(TorchBf16):
    def forward_sft(self, hidden_states, expert_ids, weights, save_for_backward=True):
        if self.layer_idx == 1:
            hidden_states[0, 0] = 7
        if self.layer_idx == 2:
            print("these are my last words", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.layer_idx == 4:
            tensor = hidden_states
            corner = tensor.detach()[(slice(0, 3),) * tensor.dim()].tolist()
            return [tensor.shape, tensor.stride(), tensor.requires_grad, tensor.data_ptr() % 64, corner]
        if self.layer_idx == 5:
            wide = torch.arange(12.0).view(3, 4)
            return [wide.t(), wide[:, 1:], wide[1], wide[:0], hidden_states[1:], torch.ones(3, requires_grad=True)]
        if self.layer_idx == 3:
            raise NotImplementedError("not on a Sunday")
        return super().forward_sft(hidden_states, expert_ids, weights, save_for_backward)
"""


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Hosted:
    path = tmp_path_factory.mktemp("hosted") / "engine.py"
    path.write_text(ENGINE.format(root=str(Path(__file__).resolve().parents[2])), encoding="utf-8")
    return Hosted(f"{path}:Engine")


def layer_of(hosted: Hosted, number: int = 0, case: Any = SMALL) -> Any:
    return build_layer(hosted, case, make_inputs(case), threads=1, layer_idx=number)


def test_the_bits_are_those_of_the_engine_itself(hosted: Hosted) -> None:
    for case in (SMALL, ODD):
        inputs = make_inputs(case)
        here = run_layer(build_layer(TorchBf16, case, inputs, threads=1), inputs)
        expect_same_bits(case.id, here, run_layer(layer_of(hosted, case=case), inputs))


def test_an_optimizer_steps_the_engines_own_parameters(hosted: Hosted) -> None:
    inputs = make_inputs(SMALL)
    layers = [build_layer(factory, SMALL, inputs, threads=1) for factory in (TorchBf16, hosted)]
    for layer in layers:
        with torch.no_grad():
            for name in LORA_NAMES:
                getattr(layer, name).mul_(2)
        before = run_layer(layer, inputs)
        layer.gate_lora_a = layer.gate_lora_a.detach() + 1
        layer.update_lora_weights()
        assert not same_bits(before["output"], run_layer(layer, inputs)["output"])
    here, found = (run_layer(layer, inputs) for layer in layers)
    expect_same_bits("after the update", here, found)


def test_the_errors_are_those_of_the_engine(hosted: Hosted) -> None:
    inputs, layer = make_inputs(SMALL), layer_of(hosted)
    with pytest.raises(ValueError, match=r"expert_ids.*-2"):
        layer.forward_sft(inputs.hidden_states, inputs.expert_ids - 2, inputs.weights)
    with pytest.raises((ValueError, TypeError), match=r"hidden_states.*meta"):
        layer.forward_sft(inputs.hidden_states.to("meta"), inputs.expert_ids, inputs.weights)
    with pytest.raises(RuntimeError, match="forward_sft"):
        layer.backward(inputs.grad_output)
    with pytest.raises(NotImplementedError, match="not on a Sunday"):
        run_layer(layer_of(hosted, 3), inputs)
    with pytest.raises(RuntimeError, match=rf"For TP, intermediate_size \({SMALL.intermediate}\)"):
        hosted(**layer_arguments(SMALL, tp=5, threads=1))


def test_what_is_written_into_inputs_is_seen_by_those_who_ask(hosted: Hosted) -> None:
    inputs, layer = make_inputs(SMALL), layer_of(hosted, 1)
    with pytest.raises(GateFailed, match="FAIL forward_sft wrote into, or beside, hidden_states:"):
        run_layer(layer, inputs)
    assert same_bits(inputs.hidden_states, make_inputs(SMALL).hidden_states)
    seen(layer)
    assert float(inputs.hidden_states[0, 0]) == 7
    assert same_bits(inputs.hidden_states[1:], make_inputs(SMALL).hidden_states[1:])


def test_a_crash_stays_in_its_process(hosted: Hosted) -> None:
    inputs, other = make_inputs(SMALL), layer_of(hosted)
    with pytest.raises(EngineDied, match=r"(?s)forward_sft: the process died of SIGSEGV"):
        run_layer(layer_of(hosted, 2), inputs)
    with pytest.raises(EngineDied, match="process is gone"):
        run_layer(other, inputs)
    run_layer(layer_of(hosted), inputs)


def test_a_python_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_python"):
        Hosted("x:y", "/no_such_python").check()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.zeros(1, dtype=torch.bfloat16).expand(1 << 20, 1 << 20),
        torch.empty(0, 7, dtype=torch.int64),
        torch.ones(3, requires_grad=True),
        torch.frombuffer(bytearray(range(65)), dtype=torch.int16, count=16, offset=1),
    ],
    ids=["transposed", "stride 0", "empty", "requires grad", "odd address"],
)
def test_tensors_arrive_unchanged(hosted: Hosted, tensor: torch.Tensor) -> None:
    corner = tensor.detach()[(slice(0, 3),) * tensor.dim()].tolist()
    shape, stride, grad, place, found = layer_of(hosted, 4).forward_sft(tensor, None, None)
    assert (shape, stride, grad) == (tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
    assert tensor.numel() == 0 or place == tensor.data_ptr() % 64
    assert found == corner


def test_results_share_memory_as_they_do_there(hosted: Hosted) -> None:
    given = torch.arange(8.0).view(4, 2)
    turned, part, row, none, inside, tracked = layer_of(hosted, 5).forward_sft(given, None, None)
    assert torch.equal(turned, torch.arange(12.0).view(3, 4).t())
    assert turned.stride() == (1, 4)
    assert none.shape == (0, 4)
    assert tracked.requires_grad
    row.fill_(7)
    assert torch.equal(part[1], row[1:])
    assert inside.data_ptr() == given[1:].data_ptr()


def test_no_memory_file_is_left(hosted: Hosted) -> None:
    layer = layer_of(hosted, 4)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        layer.forward_sft(torch.ones(3), None, None)
    assert len(os.listdir("/proc/self/fd")) == before
