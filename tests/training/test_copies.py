"""A wrapped model is copied, saved and loaded like any other, and takes several adapters of any rank and scaling."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging import version
from safetensors.torch import save_file
from torch import Tensor

from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, run_layer
from ktverify.judge.metrics import compare
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import BASE_NAMES
from ktverify.training import add_adapter, lora_config
from ktverify.training.tiny import build_model
from tests.support import models
from tests.support.command_line import python

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
FAMILY = "qwen3_moe"
IDS = models.token_ids(4, 17)


def saved(model: Any) -> Any:
    with io.BytesIO() as stream:
        torch.save(model, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


def engine_model() -> Any:
    return models.with_engine(build_model(FAMILY).float())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before any forward", "some packed", "all packed"])
def test_a_copy_computes_the_same_and_is_independent(way: str, when: str) -> None:
    model = models.adapted(engine_model())
    if when != "before any forward":
        ids = IDS if when == "all packed" else IDS[:1, :2]
        model(input_ids=ids, labels=ids).loss.backward()
    other = WAYS[way](model)
    expected = logits(model)
    assert torch.equal(logits(other), expected)
    wrapper = other._kt_wrappers[0]
    assert wrapper is not model._kt_wrappers[0]
    pairs = zip(wrapper.lora_params.values(), model._kt_wrappers[0].lora_params.values(), strict=True)
    assert all(one is not two for one, two in pairs)
    found = models.forward_backward(other, IDS)
    wanted = models.forward_backward(model, IDS)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    models.fill(other, seed=9)
    assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)
    assert other.to("cpu") is other


def test_a_saved_model_is_loaded_by_another_process(tmp_path: Path) -> None:
    model = models.adapted(engine_model())
    expected = logits(model)
    torch.save((model, IDS, expected), tmp_path / "model.pt")
    check = "assert torch.equal(model(input_ids=ids).logits, expected)"
    done = python(
        "-c",
        f"import torch\nmodel, ids, expected = torch.load({str(tmp_path / 'model.pt')!r}, "
        f"weights_only=False)\nwith torch.no_grad():\n    {check}",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tokens", [1, 40])
def test_an_engine_gives_its_base_weights_back(tp: int, tokens: int) -> None:
    case = Case.parse(f"E=5,k=2,H=97,I=46,T={tokens},r=3,alpha=6")
    inputs = make_inputs(case)
    layer = build_layer(KTMoEWrapper, case, inputs, tp=tp)
    expected = run_layer(layer, inputs)
    assert (layer.packed_experts == case.num_experts) is (tokens == 40)
    base = layer.base_weights()
    assert all(torch.equal(base[name], getattr(inputs, name)) for name in BASE_NAMES)
    for way in WAYS.values():
        found = run_layer(way(layer), inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_base_weights_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    case = Case.parse("E=4,k=2,H=64,I=32,T=1,r=3,alpha=6")
    sizes: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}
    path = tmp_path / "model.safetensors"
    layer = KTMoEWrapper(layer_idx=0, cpuinfer_threads=1, weight_path=str(path), **sizes)
    with pytest.raises(RuntimeError, match="load_weights"):
        layer.base_weights()
    assert not copy.deepcopy(layer).packed_experts
    inputs = make_inputs(case)
    save_file(
        {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": getattr(inputs, name)[expert].clone()
            for name in BASE_NAMES
            for expert in range(4)
        },
        path,
    )
    layer.load_weights()
    assert all(torch.equal(found, getattr(inputs, name)) for name, found in layer.base_weights().items())
    os.truncate(path, 1000)
    with pytest.raises(OSError, match=r"model.safetensors has 1000 bytes, and had"):
        copy.deepcopy(layer)


def test_a_copy_leaves_waiting_forwards_with_the_original() -> None:
    model = models.adapted(engine_model())
    wanted = models.forward_backward(model, IDS)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    other = copy.deepcopy(model)
    models.forward_backward(other, IDS)
    loss.backward()
    assert all(torch.equal(found, wanted[name]) for name, found in models.gradients(model).items())


# ---- its own state


def test_a_model_takes_its_own_state_strictly() -> None:
    model, other = (models.adapted(engine_model(), seed=seed) for seed in (3, 4))
    expected = logits(model)
    assert not torch.equal(logits(other), expected)
    assert not any(other.load_state_dict(model.state_dict(), strict=True))
    assert torch.equal(logits(other), expected)


def test_a_state_that_is_another_models_is_refused() -> None:
    bare = engine_model()
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj is in the state, but the engine has these weights"):
        bare.load_state_dict(build_model(FAMILY).float().state_dict())
    state = bare.state_dict()
    state.pop("lm_head.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
        bare.load_state_dict(state)


# ---- several adapters


several = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse("0.19"),
    reason="peft before 0.19 takes one adapter on parameters",
)
# ranks and alphas
SETTINGS = [(4, 8.0), (2, 6.0), (8, 4.0)]


def with_adapters(model: Any, count: int) -> Any:
    """`model` with the first adapters of SETTINGS, filled: default, a1, a2."""
    for number, (rank, alpha) in enumerate(SETTINGS[:count]):
        config = lora_config(model, rank=rank, alpha=alpha)
        if number == 0:
            model = add_adapter(model, config)
        else:
            model.add_adapter(f"a{number}", config)
            model.set_adapter(f"a{number}")
        models.fill(model, seed=number)
    return model


def result_with(model: Any, adapter: str) -> dict[str, Tensor]:
    model.set_adapter(adapter)
    return models.forward_backward(model, IDS)


@several
@pytest.mark.parametrize("first", ["default", "a1", "a2"])
def test_adapters_of_other_ranks_scalings_and_dtypes_are_switched(first: str) -> None:
    stock, engine = (with_adapters(model, 3) for model in (models.eager(FAMILY), engine_model()))
    peer = models.with_peer(with_adapters(build_model(FAMILY).float(), 3))
    for adapter in (first, "default", "a2", "a1", first):
        found, wanted, allowed = (result_with(model, adapter) for model in (engine, stock, peer))
        models.expect_within_budget(found, wanted, allowed)
    assert {wrapper.engine.spec.lora_rank for wrapper in engine._kt_wrappers} == {8}


@several
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_the_bits_of_the_adapter_that_is_active(way: str) -> None:
    model = with_adapters(engine_model(), 3)
    for adapter in ("default", "a1", "a2"):
        model.set_adapter(adapter)
        expected = logits(model)
        assert torch.equal(logits(WAYS[way](model)), expected), adapter


@several
def test_an_adapter_of_a_wider_dtype_comes_while_a_forward_waits() -> None:
    model = models.with_engine(build_model(FAMILY))
    config = lora_config(model, rank=4)
    model = models.fill(add_adapter(model, config).bfloat16(), seed=1)
    dtypes = {p.dtype for wrapper in model._kt_wrappers for p in wrapper.lora_params.values()}
    assert dtypes == {torch.bfloat16}
    wanted = models.forward_backward(model, IDS)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    bf16 = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("wide", config)
    model.set_adapter("wide")
    models.fill(model, seed=2)
    assert {wrapper.engine.gate_lora_a.dtype for wrapper in model._kt_wrappers} == {torch.bfloat16}
    found = logits(model)
    assert {wrapper.engine.gate_lora_a.dtype for wrapper in model._kt_wrappers} == {torch.float32}
    assert compare(found, wanted["logits"]).rel_l2 > 1e-2
    model.set_adapter("default")  # else its parameters take no gradient
    loss.backward()
    for name, parameter in bf16.items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, wanted[name]), name


@several
def test_an_adapter_that_comes_later_may_need_another_engine() -> None:
    engine = engine_model()
    plain = logits(engine)
    assert all(wrapper.engine.packed_experts == wrapper.num_experts for wrapper in engine._kt_wrappers)
    engine = with_adapters(engine, 1)
    assert torch.equal(logits(engine), logits(with_adapters(engine_model(), 1)))
    with engine.disable_adapter():
        assert torch.equal(logits(engine), plain)
    engine.add_adapter("a2", lora_config(engine, rank=8))
    engine.set_adapter("a2")
    models.fill(engine, seed=2)
    found = logits(engine)
    assert {wrapper.engine.spec.lora_rank for wrapper in engine._kt_wrappers} == {8}
    assert torch.equal(logits(copy.deepcopy(engine)), found)
    assert not torch.equal(found, plain)


def scaled(model: Any, by: float) -> Any:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(by)
    return model


@pytest.mark.parametrize("by", [0.5, 3.0, 0.0])
def test_a_scaling_that_is_changed(by: float) -> None:
    engine = models.adapted(engine_model())
    before = logits(engine)
    found = logits(scaled(engine, by))
    fresh = scaled(models.adapted(engine_model()), by)
    expected = logits(fresh)
    # the engine keeps its scaling, and B contains the ratio: other roundings of the same function
    assert compare(found, expected).rel_l2 <= 3e-3
    assert compare(found, before).rel_l2 > 3e-2
    if by == 0.5:  # of 3.0, one token has another expert than in fp32
        stock, peer = models.adapted(models.eager(FAMILY)), models.adapted(build_model(FAMILY).float())
        wanted, allowed = (logits(scaled(model, by)) for model in (stock, models.with_peer(peer)))
        models.expect_within_budget({"logits": found}, {"logits": wanted}, {"logits": allowed})
