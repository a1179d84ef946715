"""Experts on another device in trainings: the same losses and adapter whatever the mask, moves, mask files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ktverify.training import GpuExperts, curves, init_cpu_infer, output_directory, wrap_moe_layers
from ktverify.training.config import TrainConfig, read_config
from ktverify.training.expert_stats import count_routing
from ktverify.training.gpu_experts import gpu_experts_of, most_frequent, read_masks
from ktverify.training.run import run
from ktverify.training.tiny import build_model, make_tiny
from tests.support import models
from tests.support.command_line import call, refused

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
FAMILY = "deepseek_v2"
IDS = models.token_ids(3, 13)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(FAMILY, tmp_path_factory.mktemp("base") / FAMILY)


def config_of(base: Path, output: Path, **more: Any) -> TrainConfig:
    keys = {
        "model_name_or_path": base,
        "output_dir": output,
        "dataset": "alpaca_tiny",
        "cutoff_len": 48,
        "kt_num_threads": 1,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "kt_gpu_device": "cpu",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "max_samples": 24,
        **more,
    }
    path = output.parent / f"{output.name}.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in keys.items()))
    return read_config(path)


def trained(base: Path, output: Path, **more: Any) -> curves.Curve:
    run(config_of(base, output, **more), output.parent)
    return curves.read_curve(output)


def adapter_of(output: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    found = load_file(output / "adapter_model.safetensors")
    return {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}


def sizes_of(base: Path) -> tuple[int, int]:
    """(layers with routed experts, experts of each)."""
    document = json.loads((base / "config.json").read_text())
    return document["num_hidden_layers"] - document["first_k_dense_replace"], document["n_routed_experts"]


def write_mask(path: Path, layers: list[list[int]]) -> Path:
    path.write_text(json.dumps({"gpu_experts": layers}))
    return path


def test_a_training_has_the_same_losses_and_adapter_file_with_any_mask(base: Path, tmp_path: Path) -> None:
    layers, experts = sizes_of(base)
    mask = write_mask(tmp_path / "mask.json", [list(range(layer % 2, experts, 2)) for layer in range(layers)])
    plain = trained(base, tmp_path / "plain")
    ways: dict[str, dict[str, Any]] = {
        "mask": {"kt_gpu_experts_mask": str(mask), "gradient_checkpointing": True},
        "all": {"kt_num_gpu_experts": experts},
    }
    for name, more in ways.items():
        found = trained(base, tmp_path / name, **more)
        assert found.losses != plain.losses, "nothing was computed elsewhere"
        assert found.losses == pytest.approx(plain.losses, rel=5e-3)
        assert adapter_of(tmp_path / name) == adapter_of(tmp_path / "plain")


def test_a_training_goes_on_with_another_mask(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trained(base, tmp_path / "whole")
    trained(base, tmp_path / "moved", max_steps=3, kt_num_gpu_experts=2)
    assert output_directory.checkpoints_in(tmp_path / "moved")
    moved = trained(base, tmp_path / "moved", resume_from_checkpoint=True, kt_num_gpu_experts=3)
    assert "kt_num_gpu_experts 2 -> 3" in capsys.readouterr().err
    assert moved.steps == whole.steps
    assert moved.losses == pytest.approx(whole.losses, rel=5e-3)


def test_experts_move_between_the_steps_of_a_model() -> None:
    stock, plain, peer = models.trio(FAMILY)
    expected, budget = (models.forward_backward(model, IDS) for model in (stock, peer))
    models.expect_within_budget(models.forward_backward(plain, IDS), expected, budget)
    infer = init_cpu_infer(2, gpu=GpuExperts(2, device="cpu"))
    model = models.adapted(wrap_moe_layers(models.eager(FAMILY), infer))
    experts = model._kt_wrappers[0].num_experts
    for there in ([0, 1], [], list(range(1, experts, 2)), list(range(experts))):
        for wrapper in model._kt_wrappers:
            wrapper.set_gpu_experts_mask([expert in there for expert in range(experts)])
        models.expect_within_budget(models.forward_backward(model, IDS), expected, budget)
        for wrapper in model._kt_wrappers:
            assert wrapper.engine.spec.gpu_experts == tuple(there)
            assert not wrapper.engine.saved_forwards


def test_autocast_does_not_reach_the_device() -> None:
    infer = init_cpu_infer(1, gpu=GpuExperts(4, device="cpu"))
    model = wrap_moe_layers(build_model(FAMILY), infer)
    wrapper = model._kt_wrappers[0]
    x = torch.randn(5, wrapper.hidden_size, generator=torch.Generator().manual_seed(1))
    ids, weights = torch.arange(10).view(5, 2) % wrapper.num_experts, torch.ones(5, 2)
    with torch.no_grad():
        expected = wrapper(x, ids, weights)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(wrapper(x, ids, weights), expected)


# ---- mask files


def test_the_most_frequent_are_the_same_every_time() -> None:
    assert most_frequent([3, 9, 3, 0, 9, 3], 3) == [0, 1, 4]
    assert most_frequent([0, 0, 0], 2) == [0, 1]


def test_expert_stats_counts_every_slot_and_writes_a_mask(base: Path, tmp_path: Path) -> None:
    layers, experts = sizes_of(base)
    config = config_of(base, tmp_path / "out")
    counts = count_routing(config, tmp_path)
    assert [len(each) for each in counts] == [experts] * layers
    assert len({sum(each) for each in counts}) == 1, "every token has as many slots in each layer"
    assert sum(counts[0]) % json.loads((base / "config.json").read_text())["num_experts_per_tok"] == 0
    # the stock model routes all but the closest decisions the same way
    stock = count_routing(config.model_copy(update={"use_kt": False}), tmp_path)
    assert sum(stock[0]) == sum(counts[0])
    moved = sum(abs(a - b) for a, b in zip(counts[0], stock[0], strict=True))
    assert moved <= 0.02 * sum(counts[0])

    done = call("expert-stats", tmp_path / "out.yaml", "--experts", "2", "--out", tmp_path / "mask.json")
    assert done.exit_code == 0, done.output
    assert f"layer 0: 2 of {experts} experts take " in done.output
    written = json.loads((tmp_path / "mask.json").read_text())
    assert written["counts"] == counts
    assert read_masks(tmp_path / "mask.json") == tuple(tuple(most_frequent(each, 2)) for each in counts)
    chosen = gpu_experts_of(config_of(base, tmp_path / "out", kt_gpu_experts_mask=str(tmp_path / "mask.json")))
    assert [expert for expert, there in enumerate(chosen.mask(0, experts)) if there] == most_frequent(counts[0], 2)


def test_what_is_no_mask_of_the_model_is_refused(base: Path, tmp_path: Path) -> None:
    layers, experts = sizes_of(base)
    one, many = "kt_gpu_experts_mask", "kt_num_gpu_experts"
    rows: list[tuple[dict[str, Any], str]] = [
        (
            {many: experts + 1},
            f"kt_num_gpu_experts is {experts + 1}; a layer of this model has {experts}",
        ),
        (
            {one: [[0]] * (layers + 1)},
            f"has {layers + 1} layers; this model has {layers} with experts",
        ),
        (
            {one: [[experts]] * layers},
            f"has expert {experts} in layer 0, which has {experts} experts",
        ),
        ({one: [[0, 0]] * layers}, "gpu_experts takes a list of expert ids for each layer"),
        ({one: {"0": [1]}}, "gpu_experts takes a list of expert ids for each layer"),
        ({one: [[0]] * layers, many: 2}, "kt_num_gpu_experts is 2, "),
        ({many: 1, "kt_gpu_device": "tpu"}, "gpu_device is 'tpu'; it takes cuda, cuda:N, or cpu"),
        ({many: 1, "kt_gpu_device": "cuda:9"}, "gpu_device is 'cuda:9', and torch sees"),
    ]
    for keys, text in rows:
        given = {**keys, one: str(write_mask(tmp_path / "mask.json", keys[one]))} if one in keys else keys
        config_of(base, tmp_path / "out", **given)
        refused(call("train", tmp_path / "out.yaml"), text)
    config_of(base, tmp_path / "out")
    refused(call("expert-stats", tmp_path / "out.yaml", "--out", tmp_path / "mask.json"), "give --experts, or kt_num")
    too_many = ("--experts", experts + 1, "--out", tmp_path / "mask.json")
    refused(call("expert-stats", tmp_path / "out.yaml", *too_many), f"it takes 1 to {experts}, the experts of a layer")
