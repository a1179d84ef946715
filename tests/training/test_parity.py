"""Every family with the engine against the stock model in fp32: logits, gradients, adapters saved and merged."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from ktverify.judge.metrics import compare
from ktverify.training import add_adapter, load_adapter, lora_config, update_lora_pointers, wrap_moe_layers
from ktverify.training.export import export_merged
from ktverify.training.pretrained import load_pretrained
from ktverify.training.tiny import FAMILY_SIZES, build_model, make_tiny
from ktverify.training.wrap import FAMILIES, find_experts
from tests.support import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to move hidden states from")


def test_every_supported_family_is_checked() -> None:
    assert set(FAMILY_SIZES) == set(FAMILIES)


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=models.token_ids()).logits
    return found


@pytest.mark.parametrize(
    ("family", "device"),
    [*((family, "cpu") for family in FAMILIES), pytest.param("deepseek_v3", "cuda", marks=GPU)],
)
def test_logits_and_gradients(family: str, device: str) -> None:
    stock, engine, peer = models.trio(family)
    engine.to(device)
    assert {p.device.type for n, p in engine.named_parameters() if "lora" in n} == {device}
    ids = models.token_ids()
    routes: dict[str, list[Tensor]] = {"stock": [], "engine": []}
    with models.routing_of(stock, routes["stock"]):
        expected = models.forward_backward(stock, ids)
    with models.routing_of(engine, routes["engine"]):
        actual = models.forward_backward(engine, ids.to(device))
    # another expert for a token is another function; then the errors below would say nothing about the engine
    assert routes["stock"]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(routes["stock"], routes["engine"], strict=True))
    assert sum("experts" in name for name in expected) >= 4
    actual = {name: tensor.cpu() for name, tensor in actual.items()}
    models.expect_within_budget(actual, expected, models.forward_backward(peer, ids))


def test_a_trainable_router_gets_its_gradient() -> None:
    stock, engine, peer = models.trio("qwen3_moe")
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
    single, split = logits(one), logits(two)
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
    stock, engine, _ = models.trio("mixtral")
    with stock.disable_adapter(), engine.disable_adapter():
        plain, off = logits(stock), logits(engine)
    on, bare = logits(engine), logits(models.with_engine(build_model("mixtral").float()))
    assert float((off - plain).norm() / plain.norm()) < 5e-3
    assert float((bare - plain).norm() / plain.norm()) < 5e-3
    assert float((on - off).norm() / off.norm()) > 1e-2


def test_long_inputs_are_computed_in_pieces() -> None:
    whole, pieces = (models.adapted(models.with_engine(build_model("olmoe").float())) for _ in range(2))
    for wrapper in pieces._kt_wrappers:
        wrapper.infer = type(wrapper.infer)(2, chunked_prefill_size=16)
    ids = models.token_ids()
    expected, actual = models.forward_backward(whole, ids), models.forward_backward(pieces, ids)
    for name in expected:
        assert float((actual[name] - expected[name]).norm() / expected[name].norm()) < 1e-2, name


# ---- what is refused


def test_models_that_are_not_supported() -> None:
    refused = "Model architecture {} not supported for KTransformers: {}"
    with pytest.raises(ValueError, match="^" + refused.format("Linear", "it has no routed")):
        wrap_moe_layers(nn.Linear(1, 1))
    model = build_model("mixtral")
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()
    with pytest.raises(ValueError, match=refused.format("MixtralForCausalLM", ".*GELU")):
        wrap_moe_layers(model)
    assert not hasattr(model, "_kt_wrappers")


class Renamed(nn.SiLU):
    """A family's own name for SiLU."""


class NotSilu(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-7, 7)


ACTIVATIONS: list[tuple[Any, bool]] = [
    *((one, True) for one in (nn.SiLU(), functional.silu, ACT2FN["silu"], ACT2FN["swish"], Renamed())),
    *((one, True) for one in (lambda x: x * torch.sigmoid(x), partial(functional.silu, inplace=True))),
    (nn.SiLU(inplace=True), True),
    *((ACT2FN[name], False) for name in ("gelu", "quick_gelu", "gelu_new", "relu", "relu2", "mish", "linear")),
    *((one, False) for one in (functional.gelu, nn.GELU(), NotSilu(), functional.hardswish, torch.sigmoid)),
    *((one, False) for one in (None, "silu", lambda: 1, functional.glu, lambda x: x.tolist())),
    *((one, False) for one in (lambda x: x.sum(), lambda x: functional.silu(x.double()), lambda x: (x,))),
]


# names without addresses, which differ between processes
@pytest.mark.parametrize(
    ("activation", "taken"), ACTIVATIONS, ids=lambda each: getattr(each, "__name__", type(each).__name__)
)
def test_an_activation_is_judged_by_what_it_computes(activation: Any, taken: bool) -> None:
    model = build_model("mixtral")
    for layer in model.model.layers:
        object.__setattr__(layer.mlp.experts, "act_fn", activation)
        layer.mlp.experts._modules.pop("act_fn", None)
    if taken:
        assert len(find_experts(model)) == 2
    else:
        with pytest.raises(ValueError, match=r"MixtralExperts has the activation .*, not SiLU"):
            find_experts(model)


def test_a_family_that_names_silu_as_a_function() -> None:
    settings = AutoConfig.for_model(
        "lfm2_moe",
        vocab_size=320,
        hidden_size=72,
        intermediate_size=96,
        moe_intermediate_size=40,
        num_hidden_layers=2,
        num_dense_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=3,
        layer_types=["conv", "full_attention"],
    )
    torch.manual_seed(3)
    stock = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    for name, parameter in stock.named_parameters():
        if "experts." in name or "gate." in name:
            nn.init.normal_(parameter, std=0.15)
    models.choose_experts(stock, "eager")
    expected = logits(stock)
    assert compare(logits(models.with_engine(copy.deepcopy(stock))), expected).rel_l2 <= models.budget_beside(
        compare(logits(models.with_peer(stock)), expected).rel_l2
    )


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_one_of_several_processes_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    wrap_moe_layers(build_model("mixtral"))
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match="this is one of 2 processes, a training takes one: start it without torchrun"):
        wrap_moe_layers(build_model("mixtral"))


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


# ---- adapters


def with_engine(family: str) -> Any:
    return models.with_engine(build_model(family).float())


def expect_same_model(actual: Tensor, expected: Tensor, peer: Any) -> None:
    """Equal up to what plain bf16 experts err; `peer` is the stock model with the same adapter."""
    allowed = compare(logits(models.with_peer(peer)), expected).rel_l2
    assert compare(actual, expected).rel_l2 <= models.budget_beside(allowed)


def expect_adapter_of(family: str, folder: Path, engine: Any) -> None:
    """Stock peft and the engine compute the same with the adapter in `folder`, and another result than without."""
    stock = load_adapter(models.eager(family), folder)
    assert "ktverify" not in {type(module).__module__.partition(".")[0] for module in stock.modules()}
    expected, routes = routed_logits(stock)
    assert compare(expected, logits(models.eager(family))).rel_l2 > 0.05
    peer = models.with_peer(load_adapter(models.eager(family), folder))
    (actual, engines), (plain, peers) = routed_logits(engine), routed_logits(peer)
    # another expert for a token, by a rounding, is another function: such an example is left out
    same = ((routes == engines) & (routes == peers)).flatten(1).all(1)
    assert same.any()
    allowed = compare(plain[same], expected[same]).rel_l2
    assert compare(actual[same], expected[same]).rel_l2 <= models.budget_beside(allowed)


def routed_logits(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the experts of every token [examples, layers, tokens, k]."""
    found: list[Tensor] = []
    with models.routing_of(model, found):
        computed = logits(model)
    return computed, torch.stack([layer.view(len(computed), -1, layer.shape[-1]) for layer in found], dim=1)


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_an_adapter_moves_between_engine_and_stock_peft(family: str, tmp_path: Path) -> None:
    engine = models.adapted(with_engine(family))
    engine.save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    expect_adapter_of(family, tmp_path, engine)
    again = load_adapter(with_engine(family), tmp_path)
    assert torch.equal(logits(again), logits(engine))


@pytest.mark.parametrize(
    "settings",
    [
        {"rslora": True},
        {"alpha": 3.0},
        {"target": "all_attention"},
        {"target": "q_proj,experts"},
        {"target": ["gate_proj", "up_proj"]},
        {"target": "down_proj"},
    ],
    ids=str,
)
def test_settings_of_stock_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    models.adapted(models.eager("qwen3_moe"), **settings).save_pretrained(str(tmp_path))
    expect_adapter_of("qwen3_moe", tmp_path, load_adapter(with_engine("qwen3_moe"), tmp_path))


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*:RuntimeWarning")
def test_other_ranks_and_scalings_for_single_parameters() -> None:
    """As peft makes them of older checkpoints, where gate and up had an adapter each: twice the rank when stacked."""
    stock = models.eager("deepseek_v2")
    engine = models.with_engine(copy.deepcopy(stock))
    pair = []
    for model in (engine, stock):
        config = lora_config(model, rank=4)
        config.rank_pattern, config.alpha_pattern = {r".*\.gate_up_proj": 8}, {r".*\.gate_up_proj": 12}
        pair.append(models.fill(add_adapter(model, config)))
    peer = models.with_peer(copy.deepcopy(pair[1]))
    found = [models.forward_backward(model, models.token_ids()) for model in (*pair, peer)]
    assert found[0].keys() == found[1].keys()
    assert pair[0]._kt_wrappers[0].engine.spec.lora_rank == 8
    models.expect_within_budget(*found)


def test_dropout_acts_in_training_only_and_is_seeded(tmp_path: Path) -> None:
    model = with_engine("qwen3_moe")
    adapted: Any = models.fill(add_adapter(model, lora_config(model), dropout=0.5))

    def trained(seed: int, checkpointing: bool = False) -> dict[str, Tensor]:
        adapted.train()
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(seed)
        return models.forward_backward(adapted, models.token_ids())

    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(logits(adapted), logits(adapted))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["logits"], other["logits"])
    # a recomputed forward draws the same mask, or its gradients would belong to another function
    recomputed = trained(1, checkpointing=True)
    assert all(torch.equal(first[name], recomputed[name]) for name in first)
    adapted.save_pretrained(str(tmp_path))
    stock = load_adapter(models.eager("qwen3_moe"), tmp_path, trainable=True)  # as a training does, and without dropout
    expect_same_model(logits(adapted), logits(stock), load_adapter(models.eager("qwen3_moe"), tmp_path))


def test_merged_weights_give_the_same_logits(tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    make_tiny("deepseek_v2", base)
    engine, tokenizer = load_pretrained(str(base), "float32")
    engine = models.adapted(models.with_engine(engine))
    engine.save_pretrained(str(adapter))
    export_merged(adapter, merged, base=str(base), dtype="float32")
    expected, merged_tokenizer = load_pretrained(str(merged), "float32")
    assert merged_tokenizer.chat_template == tokenizer.chat_template
    models.choose_experts(expected, "eager")
    peer, _ = load_pretrained(str(base), "float32")
    expect_same_model(logits(engine), logits(expected), load_adapter(peer, adapter))
    with pytest.raises(ValueError, match="exists: name another directory"):
        export_merged(adapter, merged, base=str(base))
    export_merged(adapter, tmp_path / "rounded", base=str(base))
    rounded, _ = load_pretrained(str(tmp_path / "rounded"), "float32")
    weights = dict(rounded.named_parameters())
    for name, weight in expected.named_parameters():
        assert torch.equal(weights[name], weights[name].bfloat16().float()), name
        # the adapter, the base and their sum are each rounded to bf16 once
        assert compare(weights[name], weight).rel_l2 <= 2**-8, name
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_merging_into_the_engine_is_refused() -> None:
    model = models.with_engine(build_model("mixtral"))
    with pytest.raises(RuntimeError, match="would lack them: save the adapter, then python -m ktverify export-merged"):
        model.save_pretrained("nowhere")
    model = models.adapted(model)
    before, modules = logits(model), str(model)
    for merge in (model.merge_and_unload, model.merge_adapter, copy.deepcopy(model).merge_and_unload):
        with pytest.raises(RuntimeError, match="python -m ktverify export-merged"):
            merge()
        # layers before the first experts are not merged either
        assert str(model) == modules
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("layers", "kind"), [(3, "lacks"), (1, "has, beyond it,")])
def test_an_adapter_of_another_depth_is_not_merged(layers: int, kind: str, tmp_path: Path) -> None:
    models.adapted(models.eager("qwen3_moe")).save_pretrained(str(tmp_path / "adapter"))
    base = make_tiny("qwen3_moe", tmp_path / "base", sizes={"num_hidden_layers": layers})
    with pytest.raises(ValueError, match=rf"does not fit this base model: it {kind} \d+ tensors, first \S*lora_"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
    with pytest.raises(ValueError, match=r"^--base 'nowhere' is no directory"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base="nowhere")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    models.adapted(models.eager("mixtral")).save_pretrained(str(tmp_path))
    for other in (models.with_engine(build_model("qwen3_moe")), build_model("qwen3_moe")):
        with pytest.raises(ValueError, match="does not fit this base model"):
            load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"holds no adapter: adapter_config\.json is missing"):
        load_adapter(models.eager("mixtral"), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("q_prj", "did you mean q_proj"),
        (["gate_proj"], "one stacked parameter, name both"),
        ("", "lora_target is empty"),
        (["zzz"], "which this model has not; it takes all, all_attention or"),
    ],
)
def test_an_unknown_target_is_refused(target: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        lora_config(build_model("qwen3_moe"), target=target)
