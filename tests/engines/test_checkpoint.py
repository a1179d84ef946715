"""Base weights from safetensors files: the same bits as from tensors, and only what is needed in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ktverify.checks.target import expect_same_bits
from ktverify.engines.native.checkpoint import FAMILIES, INDEX
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, layer_arguments, run_layer
from ktverify.isolation.child import ChildPool
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from tests.support import checkpoints

CASE = Case.parse("E=5,k=2,H=97,I=46,T=9,r=3,alpha=6")
MEMORY = "E=16,k=2,H=2048,I=1024,T=64,r=1,alpha=2"


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_from_tensors(tmp_path: Path, family: str, files: int) -> None:
    path = checkpoints.write(tmp_path, CASE, family=family, files=files, layer=3)
    inputs = make_inputs(CASE)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, inputs), inputs)
    expect_same_bits("tensors and checkpoint", expected, run_layer(checkpoints.loaded(path, CASE, layer=3), inputs))


def test_folder_without_an_index(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, CASE, family="Mixtral", files=2)
    (tmp_path / INDEX).unlink()
    inputs = make_inputs(CASE)
    expected = run_layer(build_layer(KTMoEWrapper, CASE, inputs), inputs)
    expect_same_bits("tensors and checkpoint", expected, run_layer(checkpoints.loaded(tmp_path, CASE), inputs))


def test_physical_map_is_of_the_files_experts(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, CASE, family="Mixtral")
    inputs = make_inputs(CASE)
    slots = torch.tensor([3, 0, 4, 1, 2])
    layer = checkpoints.loaded(path, CASE)
    layer.load_weights(slots)
    other = build_layer(KTMoEWrapper, CASE, inputs)
    other.load_weights_from_tensors(inputs.gate_proj, inputs.up_proj, inputs.down_proj, slots)
    expect_same_bits("tensors and checkpoint", run_layer(other, inputs), run_layer(layer, inputs))


def test_memory(tmp_path: Path) -> None:
    ChildPool().call_fresh(checkpoints.check_memory, directory=str(tmp_path), text=MEMORY)


def _refused(path: Path | str, layer: int = 0, case: Case = CASE) -> str:
    made = KTMoEWrapper(**layer_arguments(case, threads=2, layer_idx=layer, weight_path=str(path)))
    with pytest.raises((ValueError, TypeError)) as refusal:
        made.load_weights()
    return str(refusal.value)


def test_refusals_say_what_is_wrong(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, CASE, family="Mixtral")
    assert "''" in _refused("")
    assert "nowhere" in _refused(tmp_path / "nowhere")
    assert "layer 7" in _refused(path, layer=7)
    assert "num_experts (4)" in _refused(path, case=Case.parse("E=4,k=2,H=97,I=46,T=9,r=3,alpha=6"))
    assert "experts.5.w1" in _refused(path, case=Case.parse("E=6,k=2,H=97,I=46,T=9,r=3,alpha=6"))
    assert "[46, 97]" in _refused(path, case=Case.parse("E=5,k=2,H=96,I=46,T=9,r=3,alpha=6"))
    tensors = load_file(path)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path)
    assert "torch.float32" in _refused(path)
    path.write_bytes(b"nothing of the kind")
    assert "no safetensors file" in _refused(path)
    path.unlink()
    assert "no *.safetensors" in _refused(tmp_path)
