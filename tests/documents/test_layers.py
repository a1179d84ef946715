"""The second document: environment, MOELayerWrapper, precision of one expert, memory, five errors; and of the first one
the acceptance of a training."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from ktverify.experts import KTMoEWrapper, amx_is_emulated, available_isas
from ktverify.training import add_adapter, init_cpu_infer, lora_config, wrap_moe_layers
from ktverify.training.curves import MAX_RELATIVE
from ktverify.training.tiny import build_model
from tests.support.command_line import call, ends, refused
from tests.support.models import fill, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny DeepSeek-V3 with the engine and a filled adapter on attention and experts."""
    stock = build_model("deepseek_v3").float()
    wrapped = wrap_moe_layers(stock, init_cpu_infer(2))
    return fill(add_adapter(wrapped, lora_config(wrapped, rank=4)))


# ---- 1.3 the environment


def test_1_3_the_machine_is_examined() -> None:
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.lower()
    if "amx_tile" not in listed and not amx_is_emulated():
        assert "amx_bf16" not in available_isas()
    assert re.search(r"amx_bf16 +\S", ends(call("doctor"), 0))


def test_1_3_kt_kernel_is_there() -> None:
    from kt_kernel import kt_kernel_ext  # type: ignore[import-not-found]

    with pytest.raises(AttributeError, match=r"kt_kernel_ext\.CPUInfer is not offered"):
        _ = kt_kernel_ext.CPUInfer


# ---- 5.1 MOELayerWrapper, and 7.2, 7.3


def test_7_2_a_models_wrappers_are_listed(model: Any) -> None:
    from llamafactory.model.model_utils.kt_moe import MOEAMXFunction, MOELayerWrapper

    assert [type(wrapper) for wrapper in model._kt_wrappers] == [MOELayerWrapper]
    assert issubclass(MOEAMXFunction, torch.autograd.Function)
    assert set(model._kt_wrappers[0].lora_params) == {
        "gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b",
    }  # fmt: skip


def test_5_1_forward_and_backward_of_one_layer(model: Any) -> None:
    wrapper = model._kt_wrappers[0]
    hidden = torch.randn(2, 7, 72, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = wrapper(hidden)
    assert output.shape == hidden.shape
    assert output.device == hidden.device
    model.zero_grad()
    output.sum().backward()
    for name, parameter in wrapper.lora_params.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.norm() > 0
    assert hidden.grad is not None
    with pytest.raises(RuntimeError, match="these experts have no router"):
        copy.deepcopy(wrapper)(hidden)


def test_5_1_changed_parameters_are_used(model: Any) -> None:
    """The document only asks that the call raises nothing; here the new values must count, also without the call."""
    wrapper = model._kt_wrappers[0]
    hidden = torch.randn(1, 5, 72, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = wrapper(hidden)
        for parameter in wrapper.lora_params.values():
            parameter.data.add_(0.1)
        wrapper.update_lora_pointers()
        after = wrapper(hidden)
        assert not torch.equal(before, after)
        for parameter in wrapper.lora_params.values():
            parameter.data.sub_(0.1)
        again = wrapper(hidden)
    torch.testing.assert_close(again, before, rtol=0.02, atol=0.02)


# ---- 5.3 and 7.4 precision of one expert


def reference(x: torch.Tensor, base: list[torch.Tensor], lora: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """One expert in fp64: silu(gate) * up, then down, each with its LoRA."""

    def linear(value: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return value @ weight.T + (value @ a.T @ b.T) * scaling

    gate, up, down = base
    inner = functional.silu(linear(x, gate, *lora[0:2])) * linear(x, up, *lora[2:4])
    output: torch.Tensor = linear(inner, down, *lora[4:6])
    return output


def test_5_3_forward_and_backward_of_one_expert() -> None:
    hidden, intermediate, rank, rows, scaling = 64, 48, 8, 5, 2.0
    draw = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) / math.sqrt(shape[-1])).to(torch.bfloat16)

    base = [normal(intermediate, hidden), normal(intermediate, hidden), normal(hidden, intermediate)]
    sizes = [(rank, hidden), (intermediate, rank)] * 2 + [(rank, intermediate), (hidden, rank)]
    lora = [normal(*size) for size in sizes]
    x, grad = (torch.randn(rows, hidden, generator=draw).to(torch.bfloat16) for _ in range(2))
    layer = KTMoEWrapper(
        layer_idx=0, num_experts=1, num_experts_per_tok=1, hidden_size=hidden, moe_intermediate_size=intermediate,
        cpuinfer_threads=1, lora_rank=rank, lora_alpha=scaling * rank,
    )  # fmt: skip
    gate, up, down = (tensor[None] for tensor in base)
    layer.load_weights_from_tensors(gate, up, down, torch.arange(1))
    layer.init_lora_weights(*(tensor[None].clone() for tensor in lora))
    found = layer.forward_sft(x, torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1), save_for_backward=True)
    _, grads = layer.backward(grad)
    exact = [tensor.double().requires_grad_() for tensor in lora]
    right = reference(x.double(), [tensor.double() for tensor in base], exact, scaling)
    torch.autograd.backward(right, grad.double())
    assert (found - right).abs().mean() / right.abs().mean() < 0.05
    for gradient, tensor in zip(grads.values(), exact, strict=True):
        assert tensor.grad is not None
        assert (gradient[0] - tensor.grad).abs().mean() / tensor.grad.abs().mean() < 0.10


# ---- 5.4 throughput and memory


def test_5_4_steps_take_no_more_and_more_memory(model: Any) -> None:
    """`ktverify throughput` and `ktverify memory` measure a training; here, that no step keeps anything."""
    process, tokens = psutil.Process(), token_ids()
    for step in range(12):
        model(input_ids=tokens, labels=tokens).loss.backward()
        if step == 3:
            warm = process.memory_info().rss
    assert process.memory_info().rss - warm < 64 << 20
    assert model._kt_wrappers[0].engine.saved_forwards == 0


# ---- 6 five errors


def test_6_1_a_missing_kt_kernel_is_this_engine() -> None:
    from kt_kernel.experts import KTMoEWrapper as TheirName  # type: ignore[import-not-found]

    assert TheirName is KTMoEWrapper


def test_6_2_a_cpu_without_amx_is_refused_by_name() -> None:
    if "amx_bf16" in available_isas():
        pytest.skip("this machine has AMX, or emulates it")
    with pytest.raises(RuntimeError, match="Intel AMX not supported on this CPU"):
        init_cpu_infer(isa="amx_bf16")


def test_6_3_an_architecture_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="Model architecture Qwen3ForCausalLM not supported for KTransformers"):
        wrap_moe_layers(build_model("qwen3"))


def test_6_5_parameters_are_never_stale_with_tensor_parallelism() -> None:
    model = wrap_moe_layers(build_model("mixtral"), init_cpu_infer(2, threadpool_count=4))
    adapted = fill(add_adapter(model, lora_config(model, rank=4)))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=token_ids(), labels=token_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


# ---- of the first document, 3.2 and 3.3: a training's files and curves


def test_3_2_and_3_3_a_training_is_accepted_and_compared(tmp_path: Path) -> None:
    ends(call("make-tiny", "mixtral", "--out", tmp_path / "tiny"), 0)
    configuration = tmp_path / "c.yaml"
    keys = {"model_name_or_path": tmp_path / "tiny", "dataset": "alpaca_tiny", "max_steps": 12, "learning_rate": 5e-3}
    keys |= {"per_device_train_batch_size": 4, "logging_steps": 1, "cutoff_len": 48, "kt_num_threads": 1}
    configuration.write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))
    for name in ("old", "new"):
        ends(call("train", configuration, f"output_dir={tmp_path / name}"), 0)
    with safe_open(tmp_path / "new" / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert names
        assert all("lora" in name.lower() and file.get_tensor(name).isfinite().all() for name in names)
    ends(call("verify-training", tmp_path / "new"), 0)
    assert "PASS" in ends(call("compare-curves", tmp_path / "old", tmp_path / "new"), 0)
    rows = [json.loads(line) for line in (tmp_path / "new" / "loss.jsonl").read_text().splitlines()]
    drifted = [{**row, "loss": row["loss"] * (1 + 2 * MAX_RELATIVE)} for row in rows]
    (tmp_path / "drifted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drifted))
    assert "FAIL" in ends(call("compare-curves", tmp_path / "old", tmp_path / "drifted.jsonl"), 1)


# ---- the command that runs such scripts


def test_a_script_of_kt_kernels_names_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "s.py"
    script.write_text(
        "import sys\nfrom kt_kernel.experts import KTMoEWrapper\n"
        "print(KTMoEWrapper.__module__, sys.argv[1:])\nKTMoEWrapper(layer_idx='x')\n"
    )
    result = call("run", "--as-kt-kernel", script, "--mode", "all")
    assert result.exit_code == 1
    assert "ktverify.engines.native.layer ['--mode', 'all']" in result.stdout
    assert "Traceback" in result.stderr
    refused(call("run", script), "run needs --as-kt-kernel")
    refused(call("run", "--as-kt-kernel", tmp_path / "no.py"), "there is no script")
