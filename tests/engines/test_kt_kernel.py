"""kt_kernel's adapter over a recorder in kt-kernel's place: what it hands over of codes, and what it has not.

The last test calls kt-kernel itself, and is skipped where that cannot train. tests/test_installed.py has the same gate
of another engine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ktverify.checks.quantised_inputs import draw
from ktverify.engines import kt_kernel
from ktverify.engines.run import layer_arguments
from ktverify.isolation.host import module_at
from ktverify.judge.dequantise import CODINGS
from ktverify.spec.cases import Case
from ktverify.spec.names import BASE_NAMES
from tests.support.command_line import call, ends, run_pytest

CASE = Case.parse("E=3,k=1,H=256,I=128,T=1,r=1,alpha=1")
SLOTS = torch.tensor([2, 0, 1])


class Recorder:
    """The calls that the adapter makes; kt-kernel's constructor raises `refusal` where there is one."""

    refusal: Exception | None = None

    def __init__(self, **arguments: Any) -> None:
        self.num_experts, self.layer_idx = arguments["num_experts"], arguments["layer_idx"]
        self.calls: list[tuple[str, Any]] = []
        if Recorder.refusal is not None:
            raise Recorder.refusal

    def load_weights_from_tensors(self, *given: Any) -> None:
        self.calls.append(("tensors", given))

    def load_block_fp8_weights(self, *given: Any) -> None:
        self.calls.append(("fp8", given))

    def load_weights(self, *given: Any) -> None:
        self.calls.append(("weights", given))


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    package, weights = ModuleType("kt_kernel"), ModuleType("kt_kernel.sft.weights")
    package.KTMoEWrapper, package.__cpu_variant__ = Recorder, "avx512_vbmi"  # type: ignore[attr-defined]
    weights.BlockFP8ExpertWeights = lambda *parts: parts  # type: ignore[attr-defined]
    for name, module in (("kt_kernel", package), ("kt_kernel.sft", package), ("kt_kernel.sft.weights", weights)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Recorder, "refusal", None)
    return module_at(Path(kt_kernel.__file__).with_name("adapter.py")).KtKernel


def layer_of(adapter: Any, method: str) -> Any:
    return adapter(**layer_arguments(CASE, method=method))


def test_fp8_goes_expert_by_expert_in_the_order_of_the_experts(adapter: Any) -> None:
    coded, layer = draw(CODINGS["fp8"], CASE), layer_of(adapter, "AMXFP8_SFT")
    layer.load_weights_from_tensors(**coded.arguments(SLOTS))
    ((call, (parts, order)),) = layer.wrapped.calls
    assert (call, order.tolist()) == ("fp8", [0, 1, 2])
    assert layer.wrapped.share_backward_bb is True
    assert layer_of(adapter, "AMXFP8_SFT").wrapped.layer_idx != layer.wrapped.layer_idx
    for name, codes, scales in zip(BASE_NAMES, parts[0::2], parts[1::2], strict=True):
        assert all(tensor.is_contiguous() for tensor in (*codes, *scales))
        assert torch.equal(torch.stack(codes).view(torch.uint8), coded.codes[name])
        assert torch.equal(torch.stack(scales), coded.scales[name])


def test_int8_is_the_weights_that_the_codes_stand_for(adapter: Any) -> None:
    coded, layer = draw(CODINGS["int8"], CASE), layer_of(adapter, "AMXINT8_SFT")
    layer.load_weights_from_tensors(**coded.arguments(SLOTS))
    assert [call for call, _ in layer.wrapped.calls] == ["weights"]
    assert all(torch.equal(getattr(layer.wrapped, name), weight) for name, weight in coded.weights().items())
    layer.load_weights_from_tensors(*coded.weights().values(), torch.arange(3))  # bf16, without scales
    assert all(torch.equal(getattr(layer.wrapped, name), weight) for name, weight in coded.weights().items())


@pytest.mark.parametrize("label", ["int4_32", "int4_zeros", "mxfp4"])
def test_other_codes_are_not_taken(label: str, adapter: Any) -> None:
    coding = CODINGS[label]
    with pytest.raises(NotImplementedError, match=f"codes for {coding.method}: kt-kernel takes those of FP8 and INT8"):
        layer_of(adapter, coding.method).load_weights_from_tensors(**draw(coding, CASE).arguments())
    with pytest.raises(NotImplementedError, match="makes no FP8 of bf16 weights"):
        layer_of(adapter, "AMXFP8_SFT").load_weights_from_tensors(torch.ones(3), torch.ones(3), torch.ones(3), SLOTS)


def test_a_build_without_training_says_so(adapter: Any) -> None:
    Recorder.refusal = RuntimeError("AMX SFT backend not available. kt_kernel_ext was not compiled with it.\nRecompile")
    with pytest.raises(NotImplementedError, match=r"^AMXINT8_SFT: .* \(avx512_vbmi\) has no such training, "):
        layer_of(adapter, "AMXINT8_SFT")
    Recorder.refusal = RuntimeError("For TP, intermediate_size (3) must be a multiple of threadpool_count (2)")
    with pytest.raises(RuntimeError, match=r"^For TP"):
        layer_of(adapter, "AMXBF16_SFT")


ENGINE = """
import ktverify
Engine = ktverify.Hosted({file!r}, {python!r})
"""
SCALED = """
import importlib.util
spec = importlib.util.spec_from_file_location("adapter", {adapter!r})
adapter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adapter)
class Engine(adapter.KtKernel):
    def backward(self, grad_output):
        grad_input, grads = super().backward(grad_output)
        grads["grad_up_lora_b"] *= {factor}
        return grad_input, grads
"""


def test_a_fault_beside_its_known_failures_breaks_kt_kernels_gate(tmp_path: Path) -> None:
    try:
        kt_kernel.KtKernel(**layer_arguments(CASE))
        python = kt_kernel.KtKernel.check()
    except (ValueError, NotImplementedError) as missing:
        pytest.skip(f"kt-kernel cannot train here: {missing}")
    engine, scaled = tmp_path / "engine.py", tmp_path / "scaled.py"
    engine.write_text(ENGINE.format(file=f"{scaled}:Engine", python=python))

    def gate(factor: float, *more: str) -> Any:
        adapter = str(Path(kt_kernel.__file__).with_name("adapter.py"))
        scaled.write_text(SCALED.format(adapter=adapter, factor=factor))
        run = tmp_path / f"times_{factor}"
        if not run.exists():
            which = ("suites/backward", "suites/contract/test_refusals.py", "-k", "test_case and tiny or gate_lora_b")
            run_pytest(run, *which, "--tier", "default", "-n", "0", "--engine", f"{engine}:Engine")
        return call("gate", run, "--reports", tmp_path, "--known-failures", tmp_path / "known.toml", *more)

    ends(gate(1.0, "--update-known-failures"), 0)
    assert "contract/test_refused[gate_lora_b None]" in (tmp_path / "known.toml").read_text()
    assert "of them known failures" in ends(gate(1.0), 0)
    first, second = ends(gate(1.01), 1).splitlines()[:2]
    assert first.startswith("FAIL times_1.01: 1 broke of ")
    assert second.startswith("backward/- tiny@seed=0: FAIL grad_up_lora_b rel_l2 ")
