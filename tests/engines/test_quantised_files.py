"""Codes from files: scales of other dtypes, tensor parallelism, memory, zero points that a configuration speaks of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ktverify.checks.quantised_files import LAYER, by_rows, tensors_of
from ktverify.checks.quantised_inputs import as_bf16, draw
from ktverify.checks.target import Target, expect, expect_same_bits
from ktverify.engines.checkpoint_files import Checkpoint
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import layer_arguments, run_layer
from ktverify.engines.weight_files import stored_matrix
from ktverify.isolation.child import ChildPool
from ktverify.isolation.regions import trim
from ktverify.judge.dequantise import CODINGS, packed
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import LORA_NAMES

CASE = Case.parse("E=3,k=2,H=128,I=128,T=9,r=2,alpha=4")
FOLD = "E=8,k=2,H=2048,I=1024,T=64,r=1,alpha=2"


def layer_at(path: Path, case: Case, label: str, *, tp: int = 1) -> KTMoEWrapper:
    method = CODINGS[label].method
    layer = KTMoEWrapper(**layer_arguments(case, tp=tp, method=method, weight_path=str(path), layer_idx=LAYER))
    layer.load_weights()
    layer.init_lora_weights(*(make_inputs(case).lora[name] for name in LORA_NAMES))
    return layer


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("label", "dtype", "dimensions"),
    [
        ("fp8", torch.bfloat16, 2),
        ("fp8", torch.float16, 2),
        ("int8", torch.bfloat16, 2),
        ("int8", torch.float32, 1),
        ("int4_32", torch.float16, 2),
        ("int4_128", torch.float16, 2),
        ("int4_zeros", torch.float16, 2),
        ("int4_32", torch.float32, 2),
        ("int4_zeros", torch.float32, 2),
        ("mxfp4", torch.float8_e8m0fnu, 2),
    ],
)
def test_scales_of_every_dtype_keep_their_values(
    label: str, dtype: torch.dtype, dimensions: int, tmp_path: Path
) -> None:
    coded, inputs = draw(CODINGS[label], CASE), make_inputs(CASE)
    if label != "mxfp4":  # values of that dtype; of fp16 and fp32 such as bf16 has not
        for name, scale in coded.scales.items():
            coded.scales[name] = (scale.float() * 1.001).to(dtype)
            assert dtype == torch.bfloat16 or not torch.equal(
                coded.scales[name].float(), coded.scales[name].bfloat16().float()
            )
    tensors = tensors_of(coded)
    for name in [name for name in tensors if name.endswith(("scale", "scale_inv"))]:
        tensors[name] = tensors[name].view(dtype) if label == "mxfp4" else tensors[name].to(dtype)
        tensors[name] = tensors[name].flatten() if dimensions == 1 else tensors[name]
    expected = Target("native").run(CASE, as_bf16(coded, inputs))
    expect_same_bits(label, expected, run_layer(layer_at(written(tmp_path, tensors), CASE, label), inputs))


@pytest.mark.parametrize("label", ["fp8", "int4_32"])
def test_parts_of_a_file(label: str, tmp_path: Path) -> None:
    coded, inputs = draw(CODINGS[label], CASE), make_inputs(CASE)
    path = written(tmp_path, tensors_of(coded))
    expected = Target("native").run(CASE, as_bf16(coded, inputs), tp=2)
    expect_same_bits(label, expected, run_layer(layer_at(path, CASE, label, tp=2), inputs))
    if label == "int4_32":
        with pytest.raises(RuntimeError, match=r"the 32 columns of down_proj .* degrees that would work: 1, 2, 4$"):
            layer_at(path, CASE, label, tp=8)


@pytest.mark.parametrize("zeros", [False, True])
def test_int4_whose_rows_end_inside_a_number_is_read(zeros: bool, tmp_path: Path) -> None:
    codes = torch.randint(16, (1, 9, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    scales = torch.linspace(0.5, 2, 27).bfloat16().view(9, 3)
    points = torch.arange(27).view(9, 3).to(torch.int8) % 16 - 8
    tensors = {"a.weight_packed": packed(CODINGS["int4_32"], codes)[0], "a.weight_scale": scales}
    tensors["a.weight_shape"] = torch.tensor([9, 36])
    expected = codes[0, :, :36].float().view(9, 3, 12) - 8
    if zeros:
        tensors["a.weight_zero_point"] = by_rows(points)
        expected = expected - points[..., None]
    found = stored_matrix(Checkpoint(written(tmp_path, tensors)).lookup, "a.weight", "int4", "here").dequantised()
    assert torch.equal(found, (expected * scales[..., None].float()).view(9, 36))


def test_a_configuration_with_zero_points_needs_them(tmp_path: Path) -> None:
    path = written(tmp_path, tensors_of(draw(CODINGS["int4_32"], CASE)))
    about = {"config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4, "symmetric": False}}}}
    (path / "config.json").write_text(json.dumps({"quantization_config": about}))
    with pytest.raises(ValueError, match=r"proj\.weight_packed is int4 .* without zero points; .*'symmetric': False"):
        layer_at(path, CASE, "int4_32")


def test_values_are_looked_at_once_while_a_file_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looked = written(tmp_path, tensors_of(draw(CODINGS["fp8"], CASE))), []
    monkeypatch.setattr("ktverify.engines.native.checkpoint.check_values", lambda *of: looked.append(of[1]))
    for _ in range(2):
        layer_at(path, CASE, "fp8")
    assert len(looked) == 3 * CASE.num_experts
    file = path / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    layer_at(path, CASE, "fp8")
    assert len(looked) == 6 * CASE.num_experts


def check_memory(directory: str, label: str) -> None:
    """AssertionError unless loading costs nothing, and all experts at most 1.05 times their codes and scales."""
    case, coding = Case.parse(FOLD), CODINGS[label]
    inputs, tensors = make_inputs(case), tensors_of(draw(coding, case))
    size = sum(tensor.nbytes for tensor in tensors.values())
    path = written(Path(directory), tensors)
    lora, x, ids, weights = inputs.lora, inputs.hidden_states, inputs.expert_ids, inputs.weights
    del inputs, tensors
    arguments = layer_arguments(case, method=coding.method, weight_path=str(path), layer_idx=LAYER)
    layer = KTMoEWrapper(**arguments)
    layer.init_lora_weights(*(lora[name] for name in LORA_NAMES))
    small = Path(directory) / "small"
    small.mkdir()
    layer_at(written(small, tensors_of(draw(coding, CASE))), CASE, label)  # loads libraries
    layer.clear_sft_buffer_cache()
    trim()  # what was freed would hide a copy
    process = psutil.Process()
    before = process.memory_info()

    def grown(when: str) -> float:
        """Own memory since then, over `size`. Linux maps what it has cached around an address that is read: up to 2 MiB
        of the page cache, which are no further memory; int4 has many tensors of 256 KiB."""
        now = process.memory_info()
        mapped = now.shared - before.shared
        expect(mapped < size / 2, f"{mapped / size:.2f} times the codes and scales are mapped {when}")
        return (now.rss - before.rss - mapped) / size

    layer.load_weights()
    own = grown("before a token")
    expect(own < 1 / 20, f"{own:.2f} times the codes and scales are copied before a token")
    layer.forward_sft(x, ids, weights, save_for_backward=False)
    layer.clear_sft_buffer_cache()
    expect(layer.packed_experts == case.num_experts, f"the tokens reach {layer.packed_experts} experts only")
    own = grown("after all experts are packed")
    expect(own <= 1.05, f"{own:.2f} times the codes")


@pytest.mark.parametrize("label", ["fp8", "int4_32", "int4_fp16", "int4_fp32"])
def test_memory(label: str, tmp_path: Path) -> None:
    ChildPool().call_fresh(check_memory, directory=str(tmp_path), label=label)
