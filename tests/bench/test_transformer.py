"""The timed transformer: its counts are those of its parameters and of autograd, and it computes what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ktverify.bench.transformer.memory import one_layer_live, step_memory
from ktverify.bench.transformer.model import Rope, Transformer, batch_of
from ktverify.bench.transformer.saved_tensors import saved_bytes
from ktverify.bench.transformer.sizes import ModelSize, forward_flops, parameters, presets, resolve
from ktverify.cli.bench_memory import TOLERANCE
from tests.support.command_line import call, ends, refused

TINY = ModelSize(64, 160, 3, 4, vocab_size=97, context_length=24, batch_size=2)
PARAMETERS = {
    "small": 128_625_408,
    "medium": 423_183_360,
    "large": 969_411_840,
    "xl": 1_998_235_200,
    "2.7b": 3_406_809_600,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_presets_are_those_of_the_model(name: str) -> None:
    size = presets()[name]
    model = Transformer(size, "meta")
    assert sum(parameters(size).values()) == sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_activations_of_the_presets_are_what_autograd_saves(name: str) -> None:
    size = presets()[name]
    assert saved_bytes(size, "meta") == pytest.approx(step_memory(size).all.activation_bytes, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_activations_are_what_autograd_saves_in_a_real_forward(dtype: str, attention: str) -> None:
    # exact, not within the tolerance, so that nothing can be forgotten
    size = replace(TINY, dtype=dtype, attention=attention)
    assert saved_bytes(size, "cpu") == step_memory(size).all.activation_bytes


def test_meta_tensors_save_what_a_real_forward_saves() -> None:
    assert saved_bytes(TINY, "meta") == saved_bytes(TINY, "cpu")


def test_published_figures_of_2_7b() -> None:
    size = presets()["2.7b"]
    whole = step_memory(size).all
    assert [round(count / 2**30, 2) for count in (whole.parameter_bytes, whole.gradient_bytes)] == [12.69, 12.69]
    assert round(whole.optimizer_bytes / 2**30, 2) == 25.38
    assert one_layer_live(size) == 39_600_128


def test_adamw_state_is_what_is_counted() -> None:
    model = Transformer(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    model(*batch_of(TINY)).backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert sum(moment.nbytes for moment in moments) == step_memory(TINY).all.optimizer_bytes


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = Transformer(TINY, "meta")
    with FlopCounterMode(display=False) as counter:
        model(*batch_of(TINY, "meta"))
    assert counter.get_total_flops() == forward_flops(TINY)


def test_both_attentions_agree() -> None:
    torch.manual_seed(0)
    plain = Transformer(TINY)
    fused = Transformer(replace(TINY, attention="fused"))
    fused.load_state_dict(plain.state_dict())
    tokens, targets = batch_of(TINY)
    torch.testing.assert_close(plain(tokens, targets), fused(tokens, targets))


def test_no_position_sees_a_later_one() -> None:
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens, _ = batch_of(TINY)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % TINY.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12] != after[:, 12]).any()


def test_rotations_keep_lengths_and_depend_on_distance_alone() -> None:
    rope = Rope(16, 24, 10_000.0, "cpu")
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = rope(q.expand(1, 1, 24, 16))[0, 0], rope(k.expand(1, 1, 24, 16))[0, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(24))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products.diagonal(-5), products[5, 0].expand(19), rtol=1e-4, atol=1e-4)
    assert (products[5, 0] - products[9, 0]).abs() > 1e-2


@pytest.mark.parametrize(
    ("preset", "changes", "wanted"),
    [
        ("huge", {}, "no preset is called 'huge'; there are small"),
        ("small", {"num_heads": 7}, "d_model is 768, it takes a multiple of 2 num_heads = 14"),
        ("small", {"dtype": "float8"}, "dtype is 'float8', it takes float32 or bfloat16"),
        ("small", {"attention": "flash"}, "attention is 'flash'"),
        ("small", {"rope_theta": 0.0}, "rope_theta is 0"),
        ("small", {"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_wrong_sizes_are_refused(preset: str, changes: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        resolve(preset, changes)


def test_a_changed_preset_has_another_name() -> None:
    assert resolve("small", {"num_layers": 2, "d_ff": None}).name == "small*"
    assert resolve("small", {"num_layers": 12, "context_length": 7}).name == "small"


def test_memory_command() -> None:
    text = ends(call("bench", "memory", "2.7b", "--check"), 0)
    for wanted in ("3,406,809,600", "12.69", "25.38", "39,600,128", "PASS autograd keeps 9.19 GiB"):
        assert wanted in text
    found = json.loads(ends(call("bench", "memory", "2.7b", "--json"), 0))
    assert found["parts"][-1]["parameters"] == 3_406_809_600
    assert found["total_bytes"] == sum(part[f"{kind}_bytes"] for part in found["parts"][:-1] for kind in KINDS)
    refused(call("bench", "memory", "huge"), "no preset is called 'huge'")


KINDS = ("parameter", "gradient", "optimizer", "activation")


def test_a_wrong_count_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from ktverify.bench.transformer import saved_tensors

    honest = saved_bytes(presets()["small"], "meta")
    monkeypatch.setattr(saved_tensors, "saved_bytes", lambda size, device: int(honest * 1.06))
    assert "FAIL autograd keeps" in ends(call("bench", "memory", "small", "--check"), 1)
