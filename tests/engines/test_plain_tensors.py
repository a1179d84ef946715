"""What torch says of a tensor is asked before its memory is read: odd tensors, modes, defaults, moved storages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from ktverify.engines import registry
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, layer_arguments, run_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES

CASE = Case.parse("E=5,k=2,H=97,I=46,T=9,r=3,alpha=6")
INPUTS = make_inputs(CASE)
ROUND = Case.parse("E=5,k=2,H=96,I=48,T=9,r=8,alpha=16")  # torch's grouped_mm takes multiples of 8
ROUND_INPUTS = make_inputs(ROUND)


def bits(layer: Any, inputs: Inputs = INPUTS) -> dict[str, Tensor]:
    return run_layer(layer, inputs)


def expect_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected | found:
        assert found[name].dtype == expected[name].dtype, name
        assert found[name].device.type == "cpu", name
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return bits(build_layer(KTMoEWrapper, CASE, INPUTS))


class Lying(torch.Tensor):
    """A subclass whose torch functions say that every sum is another one."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "data_ptr" in str(function) or "shape" in str(function):
            raise AssertionError("asked a subclass")
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _resized(t: Tensor) -> Tensor:
    copy = t.clone()
    copy.untyped_storage().resize_(0)
    return copy


def _nested(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(t))


def _lazy(t: Tensor) -> Any:
    make: Any = torch.nn.parameter.UninitializedParameter
    return make(t.is_floating_point(), dtype=t.dtype)


# each has no memory of its own, or not that of its values
ODD: dict[str, Callable[[Tensor], Any]] = {
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "functional": lambda t: torch._to_functional_tensor(t),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nested": _nested,
    "a subclass that dispatches": lambda t: TwoTensor(t, t),  # type: ignore[no-untyped-call]
    "lazy": _lazy,
    "resized": _resized,
    "a subclass in a list": lambda t: [t],
}


def _forward(layer: Any, **changed: Any) -> Any:
    given = {name: getattr(INPUTS, name) for name in ("hidden_states", "expert_ids", "weights")}
    return layer.forward_sft(**{**given, **changed}, save_for_backward=False)


def _base(layer: Any, **changed: Any) -> None:
    weights = {name: getattr(INPUTS, name) for name in (*BASE_NAMES, "physical_map")}
    layer.load_weights_from_tensors(**{**weights, **changed})


# argument -> the call that takes it, and its right value
ARGUMENTS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "hidden_states": (_forward, INPUTS.hidden_states),
    "expert_ids": (_forward, INPUTS.expert_ids),
    "weights": (_forward, INPUTS.weights),
    "grad_output": (lambda layer, grad_output: layer.backward(grad_output), INPUTS.grad_output),
    "gate_lora_a": (lambda layer, **new: layer.init_lora_weights(**{**INPUTS.lora, **new}), INPUTS.lora["gate_lora_a"]),
    "down_proj": (_base, INPUTS.down_proj),
    "physical_map": (_base, INPUTS.physical_map),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_without_memory_is_refused(kind: str, argument: str, expected: dict[str, Tensor]) -> None:
    layer = build_layer(KTMoEWrapper, CASE, INPUTS)
    call, right = ARGUMENTS[argument]
    if argument == "grad_output":
        layer.forward_sft(INPUTS.hidden_states, INPUTS.expert_ids, INPUTS.weights)
    with pytest.raises((TypeError, ValueError)) as caught:
        call(layer, **{argument: ODD[kind](right)})
    assert type(caught.value) in (TypeError, ValueError)
    assert argument in str(caught.value)
    assert "\n" not in str(caught.value)
    if argument == "grad_output":
        layer.backward(right)
    expect_same(bits(layer), expected)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda t: torch._neg_view(-t),
    "subclass": lambda t: t.as_subclass(Lying),
    "lazy copy": lambda t: torch._lazy_clone(t.clone()),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_negative_views_and_harmless_subclasses_are_taken(
    argument: str, view: str, expected: dict[str, Tensor]
) -> None:
    def changed(tensor: Tensor, name: str) -> Tensor:
        return VIEWS[view](tensor) if name == argument else tensor

    layer: Any = KTMoEWrapper(**layer_arguments(CASE))
    _base(layer, **{n: changed(getattr(INPUTS, n), n) for n in (*BASE_NAMES, "physical_map")})
    layer.init_lora_weights(*(changed(INPUTS.lora[name], name) for name in LORA_NAMES))
    layer.update_lora_weights()
    given = {n: changed(getattr(INPUTS, n), n) for n in ("hidden_states", "expert_ids", "weights")}
    output = layer.forward_sft(**given)
    grad_input, grads = layer.backward(changed(INPUTS.grad_output, "grad_output"))
    found = {"output": output, "grad_input": grad_input, **grads, "grad_weights": layer.grad_weights}
    expect_same(found, expected)


@contextmanager
def _default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "device meta": lambda: _default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "dtype": _default_dtype,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


# inference mode and autocast are the business of torch's own programs
@pytest.mark.parametrize(
    ("engine", "default"),
    [("native", d) for d in DEFAULTS]
    + [(e, d) for e in ("torch_bf16", "torch_grouped_mm") for d in ("device meta", "with meta", "dtype")],
)
def test_defaults_of_torch_change_nothing(engine: str, default: str) -> None:
    factory = registry.find(engine)
    right = bits(build_layer(factory, ROUND, ROUND_INPUTS), ROUND_INPUTS)
    with DEFAULTS[default]():
        found = bits(build_layer(factory, ROUND, ROUND_INPUTS), ROUND_INPUTS)
    expect_same(found, right)


def test_a_mode_that_replaces_new_tensors_is_refused(expected: dict[str, Tensor]) -> None:
    layer = build_layer(KTMoEWrapper, CASE, INPUTS)
    wanted = "a mode of torch is active in which a new tensor is a FakeTensor"
    with pytest.raises(RuntimeError, match=wanted), FakeTensorMode(allow_non_fake_inputs=True):
        _forward(layer)
    with pytest.raises(RuntimeError, match="a mode of torch is active"):
        torch.func.functionalize(lambda x: _forward(layer))(torch.ones(1))
    expect_same(bits(layer), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_that_would_lack_the_engine_is_refused(expected: dict[str, Tensor]) -> None:
    layer, trace = build_layer(KTMoEWrapper, CASE, INPUTS), torch.jit.trace
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record"):
        trace(lambda x: _forward(layer, hidden_states=x), (INPUTS.hidden_states,))  # type: ignore[no-untyped-call]
    expect_same(bits(layer), expected)


# ---- storages that move


def _by_module(tensors: list[Tensor]) -> None:
    module = torch.nn.Module()
    for place, tensor in enumerate(tensors):
        module.register_buffer(f"b{place}", tensor)
    module.share_memory()


def _by_queue(tensors: list[Tensor]) -> None:
    from multiprocessing.reduction import ForkingPickler

    for tensor in tensors:
        ForkingPickler.dumps(tensor)  # what a queue of torch.multiprocessing does


MOVES: dict[str, Callable[[list[Tensor]], Any]] = {
    "share_memory_": lambda tensors: [t.share_memory_() for t in tensors],  # type: ignore[no-untyped-call]
    "Module.share_memory": _by_module,
    "a queue": _by_queue,
    "a larger storage": lambda tensors: [t.untyped_storage().resize_(2 * t.nbytes + 4096) for t in tensors],
}


@pytest.mark.parametrize("packed", [0, 2])
@pytest.mark.parametrize("move", MOVES)
def test_base_weights_and_lora_that_move_are_found(move: str, packed: int, expected: dict[str, Tensor]) -> None:
    base = [getattr(INPUTS, name).clone() for name in BASE_NAMES]
    lora = [INPUTS.lora[name].clone() for name in LORA_NAMES]
    layer: Any = KTMoEWrapper(**layer_arguments(CASE))
    layer.load_weights_from_tensors(*base, INPUTS.physical_map)
    layer.init_lora_weights(*lora)
    if packed:
        _forward(layer, expert_ids=torch.arange(CASE.qlen * 2).reshape(-1, 2) % packed)
    was = [tensor.data_ptr() for tensor in base]
    MOVES[move]([*base, *lora])
    assert all(tensor.data_ptr() != before for tensor, before in zip(base, was, strict=True))
    decoys = [torch.full_like(tensor, torch.nan) for tensor in base for _ in range(4)]  # may get the old memory
    expect_same(bits(layer), expected)
    del decoys


def test_base_weights_that_lost_their_memory_are_refused() -> None:
    base = [getattr(INPUTS, name).clone() for name in BASE_NAMES]
    layer: Any = KTMoEWrapper(**layer_arguments(CASE))
    layer.load_weights_from_tensors(*base, INPUTS.physical_map)
    layer.init_lora_weights(*INPUTS.lora.values())
    base[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the base weights were resized before all experts were packed"):
        _forward(layer)
