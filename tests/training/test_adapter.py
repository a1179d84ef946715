"""One adapter, stock peft and the engine: saved by either, loaded by either, merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.judge.gates import peer_budget
from ktverify.judge.metrics import compare
from ktverify.training import add_adapter, load_adapter, lora_config
from ktverify.training.adapter import export_merged
from ktverify.training.pretrained import load_pretrained
from ktverify.training.tiny import FAMILY_SIZES, build_model, make_tiny
from tests.support import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
IDS = models.token_ids()


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def eager(family: str) -> Any:
    model = build_model(family).float()
    model.set_experts_implementation("eager")
    return model


def expect_same_model(actual: Tensor, expected: Tensor, peer: Any) -> None:
    """Equal up to what plain bf16 experts err; `peer` is the stock model with the same adapter."""
    allowed = compare(logits(models.with_peer(peer)), expected).rel_l2
    assert compare(actual, expected).rel_l2 <= peer_budget(allowed)


def expect_adapter_matters(with_it: Tensor, family: str) -> None:
    assert compare(with_it, logits(eager(family))).rel_l2 > 0.05


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_an_adapter_moves_between_engine_and_stock_peft(family: str, tmp_path: Path) -> None:
    engine = models.adapted(models.with_engine(build_model(family).float()))
    engine.save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    stock = load_adapter(eager(family), tmp_path)
    assert "ktverify" not in {type(module).__module__.partition(".")[0] for module in stock.modules()}
    expected = logits(stock)
    expect_adapter_matters(expected, family)
    expect_same_model(logits(engine), expected, load_adapter(eager(family), tmp_path))
    again = load_adapter(models.with_engine(build_model(family).float()), tmp_path)
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
    models.adapted(eager("qwen3_moe"), **settings).save_pretrained(str(tmp_path))
    expected = logits(load_adapter(eager("qwen3_moe"), tmp_path))
    expect_adapter_matters(expected, "qwen3_moe")
    engine = load_adapter(models.with_engine(build_model("qwen3_moe").float()), tmp_path)
    expect_same_model(logits(engine), expected, load_adapter(eager("qwen3_moe"), tmp_path))


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*:RuntimeWarning")
def test_other_ranks_and_scalings_for_single_parameters() -> None:
    """As peft makes them of older checkpoints, where gate and up had an adapter each: twice the rank when stacked."""
    stock = eager("deepseek_v2")
    engine = models.with_engine(copy.deepcopy(stock))
    pair = []
    for model in (engine, stock):
        config = lora_config(model, rank=4)
        config.rank_pattern, config.alpha_pattern = {r".*\.gate_up_proj": 8}, {r".*\.gate_up_proj": 12}
        pair.append(models.fill(add_adapter(model, config)))
    peer = models.with_peer(copy.deepcopy(pair[1]))
    found = [models.forward_backward(model, IDS) for model in (*pair, peer)]
    assert found[0].keys() == found[1].keys()
    assert pair[0]._kt_wrappers[0].engine.spec.lora_rank == 8
    models.expect_within_budget(*found)


def test_dropout_acts_in_training_only_and_is_seeded(tmp_path: Path) -> None:
    model = models.with_engine(build_model("qwen3_moe").float())
    adapted: Any = models.fill(add_adapter(model, lora_config(model), dropout=0.5))

    def trained(seed: int, checkpointing: bool = False) -> dict[str, Tensor]:
        adapted.train()
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(seed)
        return models.forward_backward(adapted, IDS)

    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(logits(adapted), logits(adapted))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["logits"], other["logits"])
    # a recomputed forward draws the same mask, or its gradients would belong to another function
    recomputed = trained(1, checkpointing=True)
    assert all(torch.equal(first[name], recomputed[name]) for name in first)
    adapted.save_pretrained(str(tmp_path))
    stock = load_adapter(eager("qwen3_moe"), tmp_path, trainable=True)  # as a training does, and without dropout
    expect_same_model(logits(adapted), logits(stock), load_adapter(eager("qwen3_moe"), tmp_path))


def test_merged_weights_give_the_same_logits(tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    make_tiny("deepseek_v2", base)
    engine, tokenizer = load_pretrained(str(base), "float32")
    engine = models.adapted(models.with_engine(engine))
    engine.save_pretrained(str(adapter))
    export_merged(adapter, merged, base=str(base), dtype="float32")
    expected, merged_tokenizer = load_pretrained(str(merged), "float32")
    assert merged_tokenizer.chat_template == tokenizer.chat_template
    expected.set_experts_implementation("eager")
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
    model = models.adapted(models.with_engine(build_model("mixtral")))
    with pytest.raises(RuntimeError, match="python -m ktverify export-merged"):
        model.merge_and_unload()


@pytest.mark.parametrize(("layers", "kind"), [(3, "lacks"), (1, "has, beyond it,")])
def test_an_adapter_of_another_depth_is_not_merged(layers: int, kind: str, tmp_path: Path) -> None:
    models.adapted(eager("qwen3_moe")).save_pretrained(str(tmp_path / "adapter"))
    base = make_tiny("qwen3_moe", tmp_path / "base", sizes={"num_hidden_layers": layers})
    with pytest.raises(ValueError, match=rf"does not fit this base model: it {kind} \d+ tensors, first \S*lora_"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
    with pytest.raises(ValueError, match=r"^--base 'nowhere' is no directory"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base="nowhere")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    models.adapted(eager("mixtral")).save_pretrained(str(tmp_path))
    for other in (models.with_engine(build_model("qwen3_moe")), build_model("qwen3_moe")):
        with pytest.raises(ValueError, match="does not fit this base model"):
            load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"holds no adapter: adapter_config\.json is missing"):
        load_adapter(eager("mixtral"), tmp_path / "nothing")


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
