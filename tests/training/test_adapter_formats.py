"""export-adapter: round trips give the same tensors or the same logits; per-expert files have the names others load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from ktverify.training import add_adapter, load_adapter, lora_config
from ktverify.training.adapter_formats import export_adapter
from ktverify.training.pretrained import load_model
from ktverify.training.tiny import make_tiny
from tests.support.command_line import call, ends, refused
from tests.support.models import fill, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
FAMILIES = ("qwen3_moe", "deepseek_v2")
EXPERT = re.compile(
    r"base_model\.model\.(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.lora_([AB])\.weight"
)


class Made:
    """A tiny base and a fused adapter with drawn values on it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.base = make_tiny(family, folder / "base")
        self.fused, self.per_expert = folder / "fused", folder / "per-expert"
        self.stock = self.model()
        self.names = {
            name: p.clone() for name, p in self.stock.named_parameters() if "experts" in name and p.dim() == 3
        }
        adapted = fill(add_adapter(self.model(), lora_config(self.stock, rank=4, alpha=12)))
        adapted.peft_config["default"].base_model_name_or_path = str(self.base)
        adapted.save_pretrained(str(self.fused))
        export_adapter(self.fused, self.per_expert, "per-expert")

    def model(self) -> Any:
        return load_model(str(self.base), "float32", option="base")

    def logits(self, adapter: Path) -> torch.Tensor:
        model = load_adapter(self.model(), adapter).eval()
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=token_ids()).logits
        return found


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("formats"), request.param)


def tensors_of(adapter: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(adapter / "adapter_model.safetensors")
    return found


def test_fused_to_per_expert_and_back_is_the_same_file(made: Made, tmp_path: Path) -> None:
    again = export_adapter(made.per_expert, tmp_path / "again", "peft")
    first, second = tensors_of(made.fused), tensors_of(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(made.logits(made.fused), made.logits(again))


def test_per_expert_has_the_deltas_of_peft_and_the_names_that_vllm_reads(made: Made) -> None:
    """Each expert's weight plus B A of its three factors is the weight that stock peft merges."""
    merged = load_adapter(made.model(), made.fused).merge_and_unload()
    weights = dict(merged.named_parameters())
    pairs: dict[tuple[str, int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors_of(made.per_expert).items():
        if "experts" in name:
            found = EXPERT.fullmatch(name)
            assert found, name
            block, expert, kind, letter = found.groups()
            pairs.setdefault((block, int(expert), kind), {})[letter] = tensor
    assert len(pairs) == 3 * 8 * len({block for block, _, _ in pairs})
    for (block, expert, kind), pair in pairs.items():
        delta = 12 / 4 * pair["B"] @ pair["A"]
        stacked = f"{block}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"
        part = slice(None) if kind == "down_proj" else slice(0, 40) if kind == "gate_proj" else slice(40, 80)
        torch.testing.assert_close(
            made.names[stacked][expert][part] + delta, weights[stacked][expert][part], rtol=1e-4, atol=1e-5
        )
        if kind == "up_proj":  # exactly the same A, twice
            assert torch.equal(pair["A"], pairs[block, expert, "gate_proj"]["A"])
    config = json.loads((made.per_expert / "adapter_config.json").read_text())
    assert {"gate_proj", "up_proj", "down_proj"} <= set(config["target_modules"])
    assert not config["target_parameters"]


def test_gate_and_up_with_factors_of_their_own_become_one(made: Made, tmp_path: Path) -> None:
    """An adapter of another program, merged by hand, against the fused one in stock peft: the same logits."""
    tensors = tensors_of(made.per_expert)
    draw = torch.Generator().manual_seed(9)
    for name in tensors:
        if ".up_proj.lora_A" in name and "experts" in name:
            tensors[name] = torch.randn(tensors[name].shape, generator=draw) * 0.1
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((made.per_expert / "adapter_config.json").read_bytes())
    fused = export_adapter(other, tmp_path / "fused", "peft")
    assert json.loads((fused / "adapter_config.json").read_text())["r"] == 8
    back = tensors_of(export_adapter(fused, tmp_path / "back", "per-expert"))
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            a, b = tensors[name.replace("lora_B", "lora_A")], back[name]
            assert torch.equal(tensor @ a, b @ back[name.replace("lora_B", "lora_A")]) or torch.allclose(
                tensor @ a, b @ back[name.replace("lora_B", "lora_A")], rtol=1e-5, atol=1e-6
            )
    hand = made.model()
    parameters = dict(hand.named_parameters())
    with torch.no_grad():
        for name, b in tensors.items():
            if not name.endswith("lora_B.weight"):
                continue
            delta = 3.0 * b @ tensors[name.replace("lora_B", "lora_A")]
            if found := EXPERT.fullmatch(name):
                block, expert, kind, _ = found.groups()
                at = {"gate_proj": (0, 40), "up_proj": (40, 80), "down_proj": (0, None)}[kind]
                stacked = f"{block}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"
                parameters[stacked][int(expert)][slice(*at)] += delta
            else:
                parameters[name.removeprefix("base_model.model.").replace("lora_B.", "")] += delta
        wanted = hand.eval()(input_ids=token_ids()).logits
    found_logits = made.logits(fused)
    assert functional.mse_loss(found_logits, wanted).sqrt() < 1e-4 * wanted.abs().mean()


def test_the_command_and_what_it_refuses(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "per-expert" in ends(call("export-adapter", made.fused, "--out", out, "--format", "per-expert"), 0)
    refused(call("export-adapter", made.fused, "--out", out, "--format", "peft"), "out exists: name another directory")
    refused(call("export-adapter", made.fused, "--out", tmp_path / "x", "--format", "kt"), "--format is 'kt', it takes")
    refused(call("export-adapter", tmp_path, "--out", tmp_path / "x", "--format", "peft"), "holds no adapter")
    tensors = tensors_of(made.per_expert)
    tensors.pop(next(name for name in tensors if ".3.down_proj.lora_B" in name))
    save_file(tensors, made.per_expert / "adapter_model.safetensors")
    text = r"the adapter has no .*\.3\.down_proj\.lora_B\.weight: it takes one with LoRA on every expert"
    refused(call("export-adapter", made.per_expert, "--out", tmp_path / "x", "--format", "peft"), text)
    assert not (tmp_path / "x").exists()
