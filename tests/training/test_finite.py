"""NaN and Inf in a training: they are shown, they stop it, and every reader of its files reports them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ktverify.errors import NotFinite
from ktverify.training import curves, run
from ktverify.training.acceptance import verify_training
from ktverify.training.config import TrainConfig
from ktverify.training.tiny import make_tiny
from tests.support.command_line import call, ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _strict(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON or JSON lines file; AssertionError for the NaN of Python, which is no JSON."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{path} has {name}, which is no JSON")

    text = path.read_text(encoding="utf-8")
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(part, parse_constant=no_constant) for part in parts]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("base") / "qwen3_moe")


def config(base: Path, output: Path, **more: Any) -> TrainConfig:
    keys = {"model_name_or_path": str(base), "dataset": "alpaca_tiny", "kt_num_threads": 1, "cutoff_len": 48}
    keys |= {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "save_steps": 1}
    return TrainConfig.model_validate(keys | {"output_dir": str(output)} | more)


def _nan_in_the_model(base: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, {}


def _far_too_fast(base: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    return base, {"learning_rate": 1e30, "max_grad_norm": 0}


def _no_accumulated_step_is_left_out(base: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    return base, {"learning_rate": 1e30, "max_grad_norm": 0, "gradient_accumulation_steps": 2, "logging_steps": 3}


CAUSES = [(_nan_in_the_model, 1), (_far_too_fast, 2), (_no_accumulated_step_is_left_out, 2)]


@pytest.mark.parametrize(("cause", "step"), CAUSES)
def test_a_training_stops_at_nan_with_step_and_file(
    cause: Callable[[Path, Path], tuple[Path, dict[str, Any]]], step: int, base: Path, tmp_path: Path
) -> None:
    model, more = cause(base, tmp_path / "model")
    output = tmp_path / "out"
    with pytest.raises(NotFinite, match=rf"stopped at step {step}: .*; see .*/out/loss.jsonl; .*stop_on_nan") as found:
        run.run(config(model, output, **more), tmp_path)
    assert ("checkpoint-1 is from before it" in str(found.value)) is (step == 2)
    last = _strict(output / "loss.jsonl")[-1]
    assert last["step"] == step
    assert "NaN" in (last["loss"], last["grad_norm"])
    assert not (output / "adapter_model.safetensors").exists()


def test_the_gradient_alone_stops_a_training(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktverify.training import trainer

    norms = iter([1.0, float("inf")])
    monkeypatch.setattr(trainer, "_norm_of_gradients", lambda model: next(norms))
    with pytest.raises(NotFinite, match=r"stopped at step 2: loss \d\.\d+, grad_norm Inf; see"):
        run.run(config(base, tmp_path / "out"), tmp_path)
    assert _strict(tmp_path / "out" / "loss.jsonl")[-1]["grad_norm"] == "Infinity"


@pytest.mark.parametrize("keys", [{"learning_rate": 1e39}, {"learning_rate": 1e20, "weight_decay": 1e25}])
def test_a_last_step_that_spoils_the_adapter_is_no_finished_training(
    keys: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(
        NotFinite, match=r"stopped at step 1: \S+lora_\S+ has NaN or Inf after the optimizer's step; see"
    ):
        run.run(config(base, output, max_steps=1, max_grad_norm=0, **keys), tmp_path)
    assert not (output / "adapter_model.safetensors").exists()
    assert not (output / "checkpoint-1").exists()
    assert run.run(config(base, tmp_path / "on", max_steps=1, stop_on_nan=False, **keys), tmp_path).summary.steps == 1


def _stopped_at_two(base: Path, output: Path) -> None:
    """A training of four steps, as if it had been stopped after the second one."""
    run.run(config(base, output, logging_steps=4, stop_on_nan=False), output)
    (output / "training.json").unlink()
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(output / name)


def test_nan_that_comes_with_a_checkpoint_is_not_saved_again(base: Path, tmp_path: Path) -> None:
    _stopped_at_two(base, tmp_path)
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    kept = torch.load(file, weights_only=True)
    next(iter(kept["state"].values()))["exp_avg"].view(-1)[0] = float("nan")
    torch.save(kept, file)
    with pytest.raises(NotFinite, match=r"stopped at step 3: .*checkpoint-2 is from before it"):
        run.run(config(base, tmp_path, logging_steps=4, resume_from_checkpoint=True), tmp_path)
    assert not (tmp_path / "checkpoint-3").exists()


def test_a_step_is_not_blamed_for_the_nan_of_an_earlier_one(base: Path, tmp_path: Path) -> None:
    _stopped_at_two(base, tmp_path)
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["LossLog"]["attributes"]["running"]["total"] = "NaN"
    file.write_text(json.dumps(state))
    done = run.run(config(base, tmp_path, logging_steps=4, resume_from_checkpoint=True), tmp_path)
    assert done.summary.steps == 2
    assert _strict(tmp_path / "loss.jsonl")[-1]["loss"] == "NaN"


def test_a_training_that_goes_on_shows_nan_everywhere(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = _nan_in_the_model(base, tmp_path / "model")
    output = tmp_path / "out"
    done = run.run(config(model, output, stop_on_nan=False, max_steps=2), tmp_path)
    assert done.summary.steps == 2
    assert "step 2/2  loss NaN" in capsys.readouterr().err
    assert [row["loss"] for row in _strict(output / "loss.jsonl")] == ["NaN", "NaN"]
    assert _strict(output / "training.json")[0]["last_loss"] == "NaN"
    for state in (output / "trainer_state.json", output / "checkpoint-1" / "trainer_state.json"):
        assert _strict(state)[0]["log_history"][0]["loss"] == "NaN"
    (output / "training.json").unlink()
    shutil.rmtree(output / "checkpoint-2")
    resumed = config(model, output, stop_on_nan=False, max_steps=2, resume_from_checkpoint=True)
    assert run.run(resumed, tmp_path).summary.steps == 1
    for path in (output, output / "trainer_state.json"):
        assert curves.read_curve(path).problem == "step 1 has loss NaN"
        text = ends(call("compare-curves", path, path, "--plot", tmp_path / "plot.png"), 1)
        assert text.splitlines()[-1] == f"FAIL {path}: step 1 has loss NaN"
    answers = {answer.name: answer for answer in verify_training(output, str(base))}
    assert answers["loss"].text == "step 1 has loss NaN"
    assert not answers["loss"].passed


ROWS = [{"step": step, "loss": 3.0 - step / 10, "grad_norm": 1.0} for step in range(1, 5)]
DAMAGES: dict[str, Any] = {
    "step 2 has loss NaN": '"loss": NaN',
    "step 2 has loss Inf": '"loss": "Infinity"',
    "step 2 has loss -Inf": '"loss": -Infinity',
    "step 2 has no loss": '"loss": null',
    "step 2 has grad_norm NaN": '"loss": 2.8, "grad_norm": "NaN"',
    "step 2 has grad_norm Inf": '"loss": 2.8, "grad_norm": Infinity',
    "step 2 has no grad_norm": '"loss": 2.8, "grad_norm": null',
}


@pytest.mark.parametrize("problem", [*DAMAGES, "step 2 has no loss at all"])
def test_every_way_to_have_no_number_fails(problem: str, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join([*lines, ""]))
    lines[1] = f'{{"step": 2, {DAMAGES[problem]}}}' if problem in DAMAGES else '{"step": 2}'
    bad.write_text("\n".join([*lines, ""]))
    wanted = problem.removesuffix(" at all")
    assert curves.read_curve(bad).problem == wanted
    for pair in ((good, bad), (bad, good), (bad, bad)):
        assert ends(call("compare-curves", *pair), 1).splitlines()[-1] == f"FAIL {bad}: {wanted}"
    ends(call("compare-curves", good, good), 0)


def test_the_gradients_norm_is_that_before_clipping() -> None:
    from ktverify.training.trainer import _norm_of_gradients

    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert _norm_of_gradients(model) == 5.0
    model.weight.grad = torch.tensor([[3e38, 3e38]])  # each is finite, the norm is not
    assert _norm_of_gradients(model) == float("inf")
