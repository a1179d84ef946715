"""Every family with the engine against the stock model in fp32: logits and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ktverify.training import add_adapter, lora_config, update_lora_pointers, wrap_moe_layers
from ktverify.training.tiny import FAMILY_SIZES, build_model
from ktverify.training.wrap import FAMILIES
from tests.support import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_every_supported_family_is_checked() -> None:
    assert set(FAMILY_SIZES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family: str) -> None:
    stock, engine = models.pair(family)
    peer = models.with_peer(copy.deepcopy(stock))
    ids = models.token_ids()
    routes: dict[str, list[Tensor]] = {"stock": [], "engine": []}
    with models.routing_of(stock, routes["stock"]):
        expected = models.forward_backward(stock, ids)
    with models.routing_of(engine, routes["engine"]):
        actual = models.forward_backward(engine, ids)
    # another expert for a token is another function; then the errors below would say nothing about the engine
    assert all(torch.equal(a, b) for a, b in zip(routes["stock"], routes["engine"], strict=True))
    assert sum("experts" in name for name in expected) >= 4
    models.expect_within_budget(actual, expected, models.forward_backward(peer, ids))


def test_a_trainable_router_gets_its_gradient() -> None:
    stock, engine = models.pair("qwen3_moe")
    peer = models.with_peer(copy.deepcopy(stock))
    found = []
    for model in (engine, stock, peer):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp.gate" in name)
        found.append(models.forward_backward(model, models.token_ids()))
    assert sum("mlp.gate" in name for name in found[0]) == 2
    models.expect_within_budget(*found)


def test_tensor_parallelism_in_a_model() -> None:
    stock = build_model("deepseek_v3").float()
    one, two = (models.adapted(models.with_engine(copy.deepcopy(stock), tp=tp)) for tp in (1, 2))
    with torch.no_grad():
        single, split = (model(input_ids=models.token_ids()).logits for model in (one, two))
    assert not torch.equal(single, torch.zeros_like(single))
    assert float((single - split).norm() / single.norm()) <= 1e-3


def test_wrapping_changes_nothing_but_the_experts() -> None:
    model = build_model("deepseek_v2")
    before = {name: p.data_ptr() for name, p in model.named_parameters() if "mlp.experts" not in name}
    models.with_engine(model)
    after = {name: p.data_ptr() for name, p in model.named_parameters() if "mlp.experts" not in name}
    assert before == after
    assert len(model._kt_wrappers) == 1  # the first layer of two is dense
    held = [p for name, p in model.named_parameters() if "mlp.experts" in name]
    assert held
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in held), "a second copy of the base weights"
    # a state that had the placeholders would be saved as zeros
    assert not [name for name in model.state_dict() if "mlp.experts" in name]


def test_the_engine_works_without_an_adapter_and_with_a_disabled_one() -> None:
    stock, engine = models.pair("mixtral")
    ids = models.token_ids()
    with torch.no_grad(), stock.disable_adapter(), engine.disable_adapter():
        plain, off = stock(input_ids=ids).logits, engine(input_ids=ids).logits
    with torch.no_grad():
        on = engine(input_ids=ids).logits
        bare = models.with_engine(build_model("mixtral").float())(input_ids=ids).logits
    assert float((off - plain).norm() / plain.norm()) < 5e-3
    assert float((bare - plain).norm() / plain.norm()) < 5e-3
    assert float((on - off).norm() / off.norm()) > 1e-2


def test_long_inputs_are_computed_in_pieces() -> None:
    whole = models.adapted(models.with_engine(build_model("olmoe").float()))
    pieces = models.adapted(models.with_engine(build_model("olmoe").float()))
    for wrapper in pieces._kt_wrappers:
        wrapper.infer = type(wrapper.infer)(2, chunked_prefill_size=16)
    ids = models.token_ids()
    expected, actual = models.forward_backward(whole, ids), models.forward_backward(pieces, ids)
    for name in expected:
        assert float((actual[name] - expected[name]).norm() / expected[name].norm()) < 1e-2, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to move hidden states from")
def test_hidden_states_on_a_gpu() -> None:
    stock, engine = models.pair("deepseek_v3")
    peer = models.with_peer(copy.deepcopy(stock))
    ids = models.token_ids()
    engine.to("cuda")
    assert {p.device.type for n, p in engine.named_parameters() if "lora" in n} == {"cuda"}
    actual = {name: tensor.cpu() for name, tensor in models.forward_backward(engine, ids.cuda()).items()}
    models.expect_within_budget(actual, models.forward_backward(stock, ids), models.forward_backward(peer, ids))


# ---- what is refused


class Plain(nn.Module):
    """No experts."""


def test_models_that_are_not_supported() -> None:
    with pytest.raises(
        ValueError, match=r"^Model architecture Plain not supported for KTransformers: it has no routed"
    ):
        wrap_moe_layers(Plain())
    model = build_model("mixtral")
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()
    with pytest.raises(
        ValueError, match=r"Model architecture MixtralForCausalLM not supported for KTransformers: .*GELU"
    ):
        wrap_moe_layers(model)
    assert not hasattr(model, "_kt_wrappers")


def test_wrapping_twice_and_degrees_that_do_not_divide() -> None:
    model = models.with_engine(build_model("qwen3_moe"))
    with pytest.raises(ValueError, match="wrapped already"):
        wrap_moe_layers(model)
    with pytest.raises(RuntimeError, match=r"intermediate_size \(40\) must be a multiple of threadpool_count \(3\)"):
        models.with_engine(build_model("qwen3_moe"), tp=3)
    with pytest.raises(ValueError, match="no engine: call wrap_moe_layers"):
        update_lora_pointers(build_model("qwen3_moe"))


def test_an_adapter_that_peft_attached_alone_is_refused() -> None:
    from peft import get_peft_model

    settings = lora_config(build_model("qwen3_moe"), rank=2)
    model = get_peft_model(models.with_engine(build_model("qwen3_moe")), settings)
    with pytest.raises(RuntimeError, match=r"attach it with ktverify\.training\.add_adapter"):
        model(input_ids=models.token_ids())


def test_an_adapter_of_another_rank_comes_too_late() -> None:
    model = models.with_engine(build_model("qwen3_moe"))
    ids = models.token_ids(8, 40)
    model(input_ids=ids)
    assert all(wrapper.engine.packed_experts == wrapper.num_experts for wrapper in model._kt_wrappers)
    late = add_adapter(model, lora_config(model, rank=2))
    with pytest.raises(RuntimeError, match="attach the adapter before the first forward"):
        late(input_ids=ids)
