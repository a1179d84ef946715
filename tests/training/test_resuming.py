"""Going on from a checkpoint: a run that ended is left alone, any other one ends as if it had never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktverify.training import curves, output_directory, run
from ktverify.training.config import TrainConfig
from ktverify.training.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS, EPOCH = 6, 4  # 63 examples in batches of 16 are 4 steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("base") / "qwen3_moe")


@pytest.fixture(scope="module")
def config(base: Path) -> Callable[..., TrainConfig]:
    """A configuration of STEPS steps that writes to `output`; further keys go over it."""

    def make(output: Path, **more: Any) -> TrainConfig:
        keys = {"model_name_or_path": str(base), "dataset": "alpaca_tiny", "kt_num_threads": 1, "cutoff_len": 48}
        keys |= {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        keys |= {
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_steps": 2,
            "lora_dropout": 0.1,
            "output_dir": str(output),
        }
        return TrainConfig.model_validate(keys | more)

    return make


@pytest.fixture(scope="module")
def finished(config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a training of STEPS steps; tests take copies."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run.run(config(output), output)
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def files_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of every file."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def resume(config: TrainConfig) -> run.Trained:
    return run.run(config.model_copy(update={"resume_from_checkpoint": True}), Path())


def expect_same_end(output: Path, whole: Path) -> None:
    """Bits of the adapter, and all of loss.jsonl but times and memory."""
    for name in output_directory.ADAPTER_FILES:
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert curves.read_curve(output) == curves.read_curve(whole)
    assert (output / output_directory.SUMMARY_FILE).is_file()
    assert (output / output_directory.LOSS_PICTURE).is_file()
    assert not list(output.glob(f"{output_directory.SAVING}*"))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, f"is finished, at step {STEPS} of {STEPS}"),
        ({"max_steps": 5}, f"is at step {STEPS}, this configuration ends at step 5"),
        ({"max_steps": 1}, "ends at step 1"),
        ({"max_steps": -1, "num_train_epochs": 1.5}, f"at step {STEPS} of {STEPS}"),
        ({"max_steps": -1, "num_train_epochs": 1.0}, f"ends at step {EPOCH}"),
    ],
)
def test_a_finished_training_is_left_alone(
    more: dict[str, Any], text: str, config: Callable[..., TrainConfig], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_model", None)  # it is not even loaded
    before = files_of(output)
    done = resume(config(output, **more))
    assert done.note.startswith("nothing to train: ")
    assert text in done.note
    assert "\n" not in done.note
    assert files_of(output) == before


def _without_the_end(output: Path) -> None:
    """As a run leaves it that was killed after its last checkpoint."""
    for name in (*output_directory.ADAPTER_FILES, curves.STATE_FILE, "training.json", "loss.png", "tokenizer.json"):
        (output / name).unlink()


def _while_saving(output: Path) -> None:
    _without_the_end(output)
    (output / f"{output_directory.SAVING}abc").mkdir()
    (output / f"{output_directory.SAVING}abc" / "adapter_config.json").write_text("{")


def _before_the_summary(output: Path) -> None:
    (output / "training.json").unlink()


def _with_an_older_end(output: Path) -> None:
    """As a longer run leaves it that was killed after its last checkpoint: the adapter is that of the shorter one."""
    older = output / "checkpoint-2" / "adapter_model.safetensors"
    shutil.copyfile(older, output / "adapter_model.safetensors")


@pytest.mark.parametrize("stopped", [_without_the_end, _while_saving, _before_the_summary, _with_an_older_end])
def test_a_run_stopped_at_its_end_gets_its_files_without_training(
    stopped: Callable[[Path], None],
    config: Callable[..., TrainConfig],
    output: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped(output)
    monkeypatch.setattr(run, "load_model", None)
    done = resume(config(output))
    assert f"checkpoint-{STEPS} is at the last step, {STEPS}; its adapter is now in {output}" in done.note
    expect_same_end(output, finished)
    assert {path.name for path in output.iterdir()} == {path.name for path in finished.iterdir()}
    after = files_of(output)
    assert "is finished" in resume(config(output)).note
    assert files_of(output) == after


@pytest.mark.parametrize("step", [2, EPOCH])
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(
    step: int, config: Callable[..., TrainConfig], output: Path, finished: Path
) -> None:
    _without_the_end(output)
    for path in output_directory.checkpoints_in(output):
        if output_directory.step_of(path) > step:
            shutil.rmtree(path)
    done = resume(config(output))
    assert done.summary.steps == STEPS - step
    expect_same_end(output, finished)


def test_a_finished_training_goes_on_where_max_steps_is_raised(
    config: Callable[..., TrainConfig], output: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    run.run(config(whole, max_steps=STEPS + 3), Path())
    done = resume(config(output, max_steps=STEPS + 3))
    assert done.summary.steps == 3
    expect_same_end(output, whole)
