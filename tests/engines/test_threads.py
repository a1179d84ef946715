"""Several Python threads and one native layer: each gets what it would get alone, and no call spoils a later one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, layer_arguments, run_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

CASE = Case.parse("E=16,k=2,H=64,I=48,T=40,r=4,alpha=8")
INPUTS, OTHER = make_inputs(CASE), make_inputs(Case.parse("E=16,k=2,H=64,I=48,T=23,r=4,alpha=8@seed=9"))
LORA = {dtype: [INPUTS.lora[name].to(dtype) for name in LORA_NAMES] for dtype in (torch.bfloat16, torch.float32)}


def in_threads(*calls: Callable[[], Any]) -> None:
    """Run them at once; raise what one of them raised."""
    raised: list[BaseException] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def forward(layer: Any, inputs: Any = INPUTS, *, save: bool = False) -> Tensor:
    output: Tensor = layer.forward_sft(inputs.hidden_states, inputs.expert_ids, inputs.weights, save_for_backward=save)
    return output


def expect_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected | found:
        assert torch.equal(found[name], expected[name]), name


def fresh(dtype: torch.dtype, **settings: Any) -> Any:
    """A layer that is the only owner of its base weights, with LoRA of this dtype."""
    layer: Any = KTMoEWrapper(**layer_arguments(CASE, **settings))
    layer.load_weights_from_tensors(*(INPUTS.slotted(name).clone() for name in BASE_NAMES), INPUTS.physical_map)
    layer.init_lora_weights(*LORA[dtype])
    return layer


@pytest.mark.parametrize("last", [torch.bfloat16, torch.float32])
def test_lora_of_another_dtype_while_weights_are_packed(last: torch.dtype) -> None:
    expected = run_layer(fresh(last), INPUTS)

    def one_round() -> None:
        layer = fresh(torch.float32 if last == torch.bfloat16 else torch.bfloat16)
        in_threads(lambda: forward(layer), lambda: layer.init_lora_weights(*LORA[last]), lambda: forward(layer))
        decoys = [torch.full((CASE.num_experts, 48, 64), torch.nan, dtype=torch.bfloat16) for _ in range(3)]
        expect_same(run_layer(layer, INPUTS), expected)
        del decoys

    for _ in range(40):
        one_round()


def test_lora_changes_its_dtype_after_the_sources_are_gone() -> None:
    layer = fresh(torch.bfloat16)
    forward(layer)
    layer.init_lora_weights(*LORA[torch.float32])
    expect_same(run_layer(layer, INPUTS), run_layer(fresh(torch.float32), INPUTS))
    forward(layer, save=True)
    with pytest.raises(RuntimeError, match="another dtype while 1 saved forwards wait"):
        layer.init_lora_weights(*LORA[torch.bfloat16])
    layer.backward(INPUTS.grad_output)


def test_new_base_weights_while_others_compute() -> None:
    expected = run_layer(fresh(torch.float32), INPUTS)
    other = make_inputs(Case.parse("E=16,k=2,H=64,I=48,T=40,r=4,alpha=8@seed=5"))
    layer = fresh(torch.float32)

    def load() -> None:
        for inputs in (other, INPUTS) * 10:
            layer.load_weights_from_tensors(*(inputs.slotted(n).clone() for n in BASE_NAMES), inputs.physical_map)

    def compute() -> None:
        for _ in range(20):
            forward(layer)

    in_threads(load, compute, compute, lambda: [layer.update_lora_weights() for _ in range(20)])
    expect_same(run_layer(layer, INPUTS), expected)


def _at_once(*calls: Callable[[], Any], rounds: int = 20) -> None:
    """The calls in threads, which the interpreter switches often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        in_threads(*(lambda call=call: [call() for _ in range(rounds)] for call in calls))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32])
def test_parameters_and_the_engines_values_change_together(other: torch.dtype) -> None:
    """Whichever thread is the last to give LoRA, the layer computes with the parameters that it shows."""
    layer = fresh(torch.bfloat16)
    twice = [tensor.to(other) * 2 for tensor in LORA[torch.bfloat16]]
    for _ in range(8):
        _at_once(
            lambda: layer.init_lora_weights(*LORA[torch.bfloat16]),
            lambda: layer.init_lora_weights(*twice),
            layer.update_lora_weights,
            layer.update_lora_weights,
            rounds=2,
        )
        alone = fresh(torch.bfloat16)
        alone.init_lora_weights(*(getattr(layer, name) for name in LORA_NAMES))
        expect_same(run_layer(layer, INPUTS), run_layer(alone, INPUTS))


def test_base_weights_are_read_of_one_load() -> None:
    found: list[dict[str, Tensor]] = []
    other = make_inputs(Case.parse("E=16,k=2,H=64,I=48,T=40,r=4,alpha=8@seed=5"))
    layer = fresh(torch.bfloat16)

    def load() -> None:
        for inputs in (other, INPUTS):
            layer.load_weights_from_tensors(*(inputs.slotted(n).clone() for n in BASE_NAMES), inputs.physical_map)

    _at_once(lambda: forward(layer), load, lambda: found.append(layer.base_weights()))
    for base in found:
        wanted = next(inputs for inputs in (INPUTS, other) if torch.equal(base["gate_proj"], inputs.gate_proj))
        assert all(torch.equal(base[name], getattr(wanted, name)) for name in BASE_NAMES)


def test_each_thread_gets_its_own_forward_and_its_own_routing_gradient() -> None:
    expected = {id(i): run_layer(build_layer(KTMoEWrapper, CASE, INPUTS), i) for i in (INPUTS, OTHER)}
    layer: Any = build_layer(KTMoEWrapper, CASE, INPUTS, max_cache_depth=4)
    saved, met = threading.Barrier(2), threading.Barrier(2)

    def both(inputs: Any) -> None:
        for _ in range(20):
            forward(layer, inputs, save=True)
            saved.wait()  # now both wait; one of them is not the newest
            forward(layer, inputs)  # a forward without a ticket changes nothing
            grad_input, grads = layer.backward(inputs.grad_output)
            met.wait()  # now both were computed
            found = {"grad_input": grad_input, **grads, "grad_weights": layer.grad_weights}
            expect_same(found, {name: expected[id(inputs)][name] for name in found})

    in_threads(lambda: both(INPUTS), lambda: both(OTHER))
    assert layer.saved_forwards == 0


def test_which_forward_a_thread_without_a_waiting_one_takes() -> None:
    layer: Any = build_layer(KTMoEWrapper, CASE, INPUTS, max_cache_depth=4)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, INPUTS), OTHER)
    forward(layer, save=True)
    forward(layer, OTHER, save=True)
    found: dict[str, Tensor] = {}

    def helper() -> None:  # a thread that made no forward works for those that did
        found["grad_input"], _ = layer.backward(OTHER.grad_output)
        found["grad_weights"] = layer.grad_weights

    in_threads(helper)
    expect_same(found, {name: expected[name] for name in found})
    assert torch.equal(layer.grad_weights, expected["grad_weights"])  # the last of all, for a thread without one
    layer.backward(INPUTS.grad_output)
    in_threads(lambda: forward(layer, save=True))
    with pytest.raises(RuntimeError, match="backward without a saved forward"):
        layer.backward(INPUTS.grad_output)  # this thread's were used; the other's is not taken from it
    assert layer.saved_forwards == 1


def test_tickets_name_forwards_whatever_other_threads_do() -> None:
    layer: Any = build_layer(KTMoEWrapper, CASE, INPUTS, max_cache_depth=4)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, INPUTS), INPUTS)
    given = (INPUTS.hidden_states, INPUTS.expert_ids, INPUTS.weights)
    _, ticket = layer.forward_with_ticket(*given)
    in_threads(lambda: forward(layer, OTHER, save=True), lambda: forward(layer, OTHER))
    _, none = layer.forward_with_ticket(*given, room=2)
    assert none == 0
    assert layer.saved_forwards == 2
    grad_input, grads, grad_weights = layer.backward_of(ticket, INPUTS.grad_output)
    found = {"grad_input": grad_input, **grads, "grad_weights": grad_weights}
    expect_same(found, {name: expected[name] for name in found})
    with pytest.raises(RuntimeError, match="used or dropped"):
        layer.backward_of(ticket, INPUTS.grad_output)


@pytest.mark.parametrize("argument", ["expert_ids", "weights", "hidden_states", "grad_output", "lora", "base"])
def test_input_that_another_thread_writes_meanwhile(argument: str) -> None:
    expected = run_layer(build_layer(KTMoEWrapper, CASE, INPUTS), INPUTS)
    inputs, stop = make_inputs(CASE), threading.Event()
    base = [inputs.slotted(name).clone() for name in BASE_NAMES]
    lora = [inputs.lora[name].clone() for name in LORA_NAMES]
    layer: Any = KTMoEWrapper(**layer_arguments(CASE))
    layer.load_weights_from_tensors(*base, inputs.physical_map)
    layer.init_lora_weights(*lora)
    written = {"lora": lora, "base": base}.get(argument) or [getattr(inputs, argument)]
    right = [tensor.clone() for tensor in written]
    refused: list[str] = []
    wrong = [torch.full_like(t, 1 << 60 if t.dtype == torch.int64 else torch.nan) for t in written]

    def write() -> None:
        while not stop.is_set():
            for values in (wrong, right):
                for tensor, value in zip(written, values, strict=True):
                    tensor.copy_(value)

    def compute() -> None:
        try:
            for _ in range(60):
                try:
                    layer.update_lora_weights()
                    forward(layer, inputs, save=True)
                    layer.backward(inputs.grad_output)
                except ValueError as error:
                    refused.append(str(error))
        finally:
            stop.set()

    in_threads(write, compute)
    assert all("expert_ids[" in text for text in refused)
    for tensor, value in zip(written, right, strict=True):
        tensor.copy_(value)
    if argument == "base":  # those that were packed while they were written have no right values
        layer.load_weights_from_tensors(*base, inputs.physical_map)
    layer.update_lora_weights()
    expect_same(run_layer(layer, INPUTS), expected)


@pytest.mark.parametrize("move", [False, True])
def test_both_sides_of_a_call_have_the_same_weights_whatever_other_threads_change(
    move: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = [expert % 2 == 0 for expert in range(CASE.num_experts)]
    layer = fresh(torch.bfloat16, gpu_experts_mask=mask, gpu_device="cpu")
    expected = forward(layer)
    launch = layer._device.launch
    others: list[threading.Thread] = []

    def change() -> None:
        layer.down_lora_b = layer.down_lora_b * -2
        if move:
            layer.set_gpu_experts_mask([not there for there in mask])
        else:
            layer.update_lora_weights()

    def launch_beside_a_change(*given: Any, **named: Any) -> Any:
        begun = launch(*given, **named)
        others.append(threading.Thread(target=change))
        others[0].start()
        others[0].join(0.5)  # in its turn it ends after this call
        return begun

    monkeypatch.setattr(layer._device, "launch", launch_beside_a_change)
    assert torch.equal(forward(layer), expected)
    monkeypatch.undo()
    others[0].join()
    assert not torch.equal(forward(layer), expected), "the change comes after the call"
