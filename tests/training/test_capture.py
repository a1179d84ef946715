"""Calls of a training as files: which are written, what they say, and engines judged on them by `replay`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ktverify.spec.captured import read
from ktverify.training import capture, capturing, init_cpu_infer
from ktverify.training.capture import CALLS_VARIABLE, VARIABLE, Capture
from ktverify.training.tiny import build_model, make_tiny
from tests.support import models
from tests.support.command_line import call, ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = models.token_ids(2, 9)


def steps(model: Any, count: int) -> None:
    for _ in range(count):
        torch.autograd.backward(model(input_ids=IDS, labels=IDS).loss)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.adapted(models.with_engine(build_model("qwen3_moe").float()))


def test_chosen_calls_are_written(model: Any, tmp_path: Path) -> None:
    with capturing(tmp_path, calls="0,2:4"):
        steps(model, 5)
    wrappers = model._kt_wrappers
    layers = [wrapper.layer_idx for wrapper in wrappers]
    names = [f"layer{layer:03d}_call{number:06d}.safetensors" for layer in layers for number in (0, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    found, spec = read(tmp_path / names[0]), wrappers[0].engine.spec
    case = found.case
    assert (case.num_experts, case.top_k, case.hidden) == (spec.num_experts, spec.num_experts_per_tok, spec.hidden_size)
    assert (case.intermediate, case.qlen, case.rank) == (spec.moe_intermediate_size, IDS.numel(), spec.lora_rank)
    assert case.lora_dtype == "float32"
    assert torch.allclose(found.weights.sum(-1), torch.ones(IDS.numel()), atol=1e-2)
    # a backward was seen, and no token is in the file
    assert found.spread["hidden_states"] > 0
    assert found.spread["grad_output"] > 0
    assert found.tensors == {}


def test_nothing_is_written_outside(model: Any, tmp_path: Path) -> None:
    with capturing(tmp_path / "outer", tensors=True):
        with capturing(tmp_path / "inner", calls="9"), torch.no_grad():
            model(input_ids=IDS)
        with torch.no_grad():
            model(input_ids=IDS)
    assert not (tmp_path / "inner").exists()
    for path in (tmp_path / "outer").iterdir():
        found = read(path)
        assert set(found.tensors) == set(found.spread) == {"hidden_states"}
    steps(model, 1)
    assert len(list((tmp_path / "outer").iterdir())) == len(model._kt_wrappers)


@pytest.mark.parametrize("calls", ["", "x", "-1", "1;2", "1:2:0", "1:2:3:4"])
def test_wrong_calls_are_refused(calls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=re.escape(f"({CALLS_VARIABLE}) are {calls!r}; it takes ")):
        Capture(tmp_path, calls)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv(CALLS_VARIABLE, calls)
    with pytest.raises(ValueError, match=CALLS_VARIABLE):
        init_cpu_infer(1)


def test_a_full_disk_ends_the_capture_and_not_the_training(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(capture, "write", full)
    with capturing(tmp_path, calls="0:"):
        steps(model, 2)
    assert capfd.readouterr().err.count("No space left on device; no more calls are captured") == 1


def test_a_captured_training_is_replayed_on_three_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, folder = make_tiny("qwen3_moe", tmp_path / "tiny"), tmp_path / "calls"
    monkeypatch.setenv(VARIABLE, str(folder))
    monkeypatch.setenv(CALLS_VARIABLE, "1")
    keys = {"model_name_or_path": tiny, "output_dir": tmp_path / "out", "max_steps": 2, "kt_num_threads": 1}
    ends(call("train", "examples/minimal.yaml", *(word for key in keys for word in (f"--{key}", keys[key]))), 0)
    monkeypatch.delenv(VARIABLE)
    files = sorted(folder.iterdir())
    assert files
    for engine in ("native", "torch_bf16", "torch_grouped_mm"):
        done = call("replay", folder, "--engine", engine)
        ends(done, 0)
        assert done.stdout.splitlines()[-1] == f"PASS {9 * len(files)} comparisons"
    done = call("replay", files[0], "--engine", "ktverify.mutants.lora:lora_scale_one")
    ends(done, 1)
    assert f"python -m ktverify replay {files[0]} --engine ktverify.mutants.lora:lora_scale_one" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAIL ")


def test_replay_refuses_what_is_no_captured_call(tmp_path: Path) -> None:
    assert "no captured calls (*.safetensors) are there" in ends(call("replay", tmp_path), 2)
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    assert f"{tmp_path / 'x.safetensors'}: " in ends(call("replay", tmp_path), 2)
