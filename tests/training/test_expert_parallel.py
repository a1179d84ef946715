"""Experts divided among processes: the oracle's answer, the bits of one process, and the end of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ktverify.engines.expert_parallel import Share
from ktverify.judge.gates import Verdict, judge
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward
from ktverify.judge.rounding import rounding_errors
from ktverify.spec.names import ALL_TENSORS, BASE_NAMES
from ktverify.training import GpuExperts, init_cpu_infer, wrap_moe_layers
from ktverify.training.tiny import build_model, make_tiny
from tests.support import models, ranks
from tests.support.checkpoints import tensors_of, written
from tests.support.quantised_checkpoints import INT4, in_int4

SIZES = (1, 2, 3, 4)
# modules that the ranks' parent imports once
PRELOAD = ("peft",)
ROUTINGS = ranks.routings()
Results = dict[str, list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """By number of ranks and routing, for each of two calls: all tensors of all tokens and all experts."""
    every: dict[int, Results] = {}
    for size in SIZES:
        parts = ranks.on_ranks(size, tmp_path_factory.mktemp(f"ranks{size}"), ranks.layer_results, 2)
        every[size] = {
            name: [
                {key: torch.cat([part[name][turn][key] for part in parts]) for key in ALL_TENSORS} for turn in (0, 1)
            ]
            for name in ROUTINGS
        }
    return every


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_tensor_keeps_the_budget(name: str, found: dict[int, Results]) -> None:
    inputs = ranks.inputs_of(ROUTINGS[name][1])
    expected, rounding = forward_backward(inputs), rounding_errors(inputs)
    for size in SIZES:
        for key in ALL_TENSORS:
            difference = compare(found[size][name][0][key], expected[key])
            # the routing is meant to leave experts idle
            verdict = judge(ranks.CASE, key, difference, rounding[key], gates_off=frozenset({"trust"}))
            assert verdict.verdict is Verdict.PASS, f"{size} ranks: {verdict.line}"
            assert expected[key].any() or name == "no slot at all"
            assert difference.non_finite == difference.stray == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_any_number_of_ranks_has_the_bits_of_one(name: str, size: int, found: dict[int, Results]) -> None:
    expected = found[1][name][0]
    for again in found[size][name]:
        assert [key for key in ALL_TENSORS if not torch.equal(again[key], expected[key])] == []


@pytest.mark.parametrize("backend", ["AMXBF16", "AMXInt4"])
def test_a_rank_reads_its_own_experts_alone(backend: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 8, "head_dim": 32}
    small, large = make_tiny("qwen3_moe", tmp_path / "small"), make_tiny("qwen3_moe", tmp_path / "large", sizes=sizes)
    if backend == "AMXInt4":
        wide = make_tiny(
            "qwen3_moe", tmp_path / "wide", sizes={"hidden_size": 96, "moe_intermediate_size": 64, "head_dim": 32}
        )
        small, large = (
            written(path, tmp_path / f"{path.name}4", in_int4(tensors_of(path))[0], quantization_config=INT4)
            for path in (wide, large)
        )
    whole = 2 * 8 * 3 * 512 * 1024 * 2  # bytes of all experts in bf16
    told = {}
    for size in (1, 3):
        (tmp_path / str(size)).mkdir()
        given = (str(small), str(large), backend)
        told[size] = ranks.on_ranks(size, tmp_path / str(size), ranks.experts_in_files, *given, preload=PRELOAD)
    for layer, expected in enumerate(told[1][0][0]):
        for name in BASE_NAMES:
            found = torch.cat([part[0][layer][name] for part in told[3]])
            assert torch.equal(found, expected[name])
    assert [part[1] for part in told[3]] == [[2, 2], [3, 3], [3, 3]]
    share = 1.0 if backend == "AMXBF16" else 0.28
    in_one = told[1][0][2]
    assert in_one > 0.9 * share * whole
    for experts, (_, _, grown) in zip((2, 3, 3), told[3], strict=True):
        # the rest of the model, and buffers of the call, are in both
        less = (in_one - grown) / (share * whole * (8 - experts) / 8)
        assert less > 0.9, f"{grown / whole:.2f} of all experts in bf16, in one process {in_one / whole:.2f}"


@pytest.mark.parametrize("way", ["ended", "silent"])
def test_a_rank_that_is_gone_ends_the_others_with_one_line(way: str, tmp_path: Path) -> None:
    said, other = ranks.on_ranks(2, tmp_path, ranks.lost, way, timeout_s=8.0)
    assert other == (None if way == "ended" else "")
    assert said.startswith("rank 0 of 2 stops: another rank ended or gave no answer in time")
    assert "\n" not in said


def test_processes_without_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="call init_process_group first"):
        Share(None, 4)
    infer = init_cpu_infer(1, gpu=GpuExperts(1, device="cpu"))
    with pytest.raises(ValueError, match="some are to be on a GPU: take one"):
        wrap_moe_layers(build_model("deepseek_v3"), infer, expert_parallel=object())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_trains_and_saves_as_one_rank_does(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    models.adapted(models.with_engine(build_model("deepseek_v3").float())).save_pretrained(str(adapter))
    told = {}
    for size in (1, 3):
        (tmp_path / str(size)).mkdir()
        saved = str(tmp_path / str(size) / "saved")
        told[size] = ranks.on_ranks(size, tmp_path / str(size), ranks.model_results, str(adapter), saved)
    (loss, expected, held), several = told[1][0], told[3]
    assert sum(part[0] for part in several) == pytest.approx(loss, rel=1e-3)
    for layer, whole in held.items():
        # 8 experts: 2, 3 and 3
        assert [part[2][layer] * 8 for part in several] == [2 * whole, 3 * whole, 3 * whole]
    for name, gradient in expected.items():
        parts = [part[1][name] for part in several]
        if "experts" not in name:
            found = sum(parts[1:], parts[0])
        elif "lora_A" in name:
            found = torch.cat(parts)
        else:
            found = torch.cat([p.reshape(len(p), -1, n) for p, n in zip(parts, (2, 3, 3), strict=True)], 2).flatten(1)
        # only roundings of single rows to bf16 differ: upstream gradients are not the same bits in another batch
        assert float((found - gradient).norm() / gradient.norm()) <= 5e-3, name
    stored = load_file(adapter / "adapter_model.safetensors")
    for size in (1, 3):
        again = load_file(tmp_path / str(size) / "saved" / "adapter_model.safetensors")
        assert again.keys() == stored.keys()
        assert all(torch.equal(again[name], stored[name]) for name in stored)
