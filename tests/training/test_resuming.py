"""Going on from a checkpoint: a run that ended is left alone, any other one ends as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktverify.training import curves, output_directory, run
from ktverify.training.config import TrainConfig
from ktverify.training.dataset import example_data
from ktverify.training.resume import kept_of
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
    cut_after(step, output)
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


# ---- the loss of a line is that of all its steps


def cut_after(step: int, output: Path) -> None:
    """Leave what a run has that was killed behind its checkpoint of this step."""
    _without_the_end(output)
    for path in output_directory.checkpoints_in(output):
        if output_directory.step_of(path) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def sparse(config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with a checkpoint at every step, and losses at steps 4 and 6; a step is two batches."""
    output = tmp_path_factory.mktemp("sparse") / "out"
    run.run(config(output, **SPARSE), output)
    return output


SPARSE = {"save_steps": 1, "logging_steps": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_line_is_the_same_wherever_a_run_was_stopped(
    step: int, config: Callable[..., TrainConfig], sparse: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(sparse, tmp_path / "out")
    cut_after(step, output)
    resume(config(output, **SPARSE))
    assert curves.read_curve(output).steps == (4, 6)
    expect_same_end(output, sparse)
    assert curves.read_curve(output / curves.STATE_FILE) == curves.read_curve(sparse / curves.STATE_FILE)


def test_a_longer_run_has_no_line_of_the_shorter_ones_end(
    config: Callable[..., TrainConfig], sparse: Path, tmp_path: Path
) -> None:
    output, whole = shutil.copytree(sparse, tmp_path / "out"), tmp_path / "whole"
    for directory in (output, whole):
        longer = config(directory, **SPARSE | {"max_steps": 8})
        resume(longer) if directory is output else run.run(longer, Path())
    assert curves.read_curve(output).steps == (4, 8)
    expect_same_end(output, whole)


def test_other_lines_and_checkpoints_are_those_now_asked_for(
    config: Callable[..., TrainConfig], output: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_after(2, output)
    resume(config(output, logging_steps=3, save_steps=3, kt_num_threads=2, gradient_checkpointing=True))
    found, all_losses = curves.read_curve(output), curves.read_curve(finished).losses
    assert found.steps == (1, 2, 3, 6)
    assert found.losses[3] == pytest.approx(sum(all_losses[3:6]) / 3)
    assert [path.name for path in output_directory.checkpoints_in(output)] == [f"checkpoint-{n}" for n in (6, 3, 2)]
    changed = "kt_num_threads 1 -> 2; gradient_checkpointing false -> true; logging_steps 1 -> 3; save_steps 2 -> 3"
    assert f"without effect on the steps: {changed}; output_dir" in capsys.readouterr().err
    assert (output / "adapter_model.safetensors").read_bytes() == (finished / "adapter_model.safetensors").read_bytes()


# ---- a changed configuration


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"learning_rate": 2e-2}, "learning_rate 0.01 -> 0.02;"),
    "rank": ({"lora_rank": 4}, "lora_rank 8 -> 4; lora_alpha 16.0 -> 8.0;"),
    "alpha": ({"lora_alpha": 32}, "lora_alpha 16.0 -> 32.0;"),
    "target": ({"lora_target": "all_attention"}, "lora_target all -> all_attention;"),
    "targets": ({"lora_target": ["q_proj", "experts"]}, "lora_target all -> experts,q_proj;"),
    "rslora": ({"use_rslora": True}, "use_rslora false -> true;"),
    "dropout": ({"lora_dropout": 0.0}, "lora_dropout 0.1 -> 0.0;"),
    "dtype": ({"torch_dtype": "float32"}, "torch_dtype bfloat16 -> float32;"),
    "engine": ({"use_kt": False}, "use_kt true -> false; give"),
    "tp": ({"kt_tp_enabled": True, "kt_tp_count": 2}, "kt_tp_count 1 -> 2;"),
    "batch": ({"per_device_train_batch_size": 8}, "per_device_train_batch_size 16 -> 8;"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2;"),
    "seed": ({"seed": 1}, "seed 42 -> 1;"),
    "decay": ({"weight_decay": 0.1}, "weight_decay 0.0 -> 0.1;"),
    "clipping": ({"max_grad_norm": 0.5}, "max_grad_norm 1.0 -> 0.5;"),
    "optimizer": ({"adam_beta2": 0.99, "optim": "adamw_torch"}, "optim adamw_torch_fused -> adamw_torch; adam_beta2"),
    "scheduler": ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type constant -> cosine;"),
    "warmup": ({"warmup_ratio": 0.5}, "warmup_ratio 0.0 -> 0.5;"),
    "cutoff": ({"cutoff_len": 32}, "cutoff_len 48 -> 32; dataset alpaca_tiny (content"),
    "examples": ({"max_samples": 40}, "dataset alpaca_tiny (content"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_change_of_the_training_is_refused_with_old_and_new(
    what: str, config: Callable[..., TrainConfig], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, text = REFUSED[what]
    monkeypatch.setattr(run, "load_model", None)
    before = files_of(output)
    with pytest.raises(ValueError, match=r"^the checkpoint belongs to another training: ") as found:
        resume(config(output, **more))
    assert text in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 400
    assert files_of(output) == before


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_another_length_is_refused_where_it_changes_the_rates_of_steps_done(
    scheduler: str, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    keys = {"lr_scheduler_type": scheduler, "warmup_ratio": 0.5, "max_steps": 2}
    run.run(config(tmp_path / "out", **keys), tmp_path)
    with pytest.raises(ValueError, match=rf"steps in all 2 -> 4 \(lr_scheduler_type {scheduler} spreads"):
        resume(config(tmp_path / "out", **keys | {"max_steps": 4}))
    assert "nothing to train" in resume(config(tmp_path / "out", **keys | {"max_steps": 1})).note


def test_content_counts_and_not_the_path(
    config: Callable[..., TrainConfig], base: Path, finished: Path, output: Path, tmp_path: Path
) -> None:
    data, moved = tmp_path / "same.json", tmp_path / "moved"
    data.write_bytes(example_data().read_bytes())
    shutil.copytree(base, moved)
    same = config(output, dataset=str(data), model_name_or_path=str(moved))
    assert "is finished" in resume(same).note
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=rf"model_name_or_path {base} \(content \w+\) -> {moved} \(content \w+\);"):
        resume(same)
    data.write_text(data.read_text(encoding="utf-8").replace("Paris", "Rome"), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"dataset alpaca_tiny \(content \w+\) -> {data} \(content \w+\); model_name"):
        resume(same)


def test_a_checkpoint_of_another_program_is_refused(config: Callable[..., TrainConfig], output: Path) -> None:
    for path in output_directory.checkpoints_in(output):
        state = json.loads((path / curves.STATE_FILE).read_text())
        del state["stateful_callbacks"]["LossLog"]
        (path / curves.STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"no whole checkpoint to resume from; checkpoint-6: .* keeps no configuration"
    ):
        resume(config(output))


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", "{}", '{"global_step": "x"}', '{"global_step": 6, "stateful_callbacks": null}']
)
def test_a_state_of_another_form_is_named(text: str, config: Callable[..., TrainConfig], output: Path) -> None:
    for path in output_directory.checkpoints_in(output):
        (path / curves.STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"no whole checkpoint to resume from; checkpoint-6: .*trainer_state\.json"):
        resume(config(output))


def test_every_key_is_harmless_or_refused() -> None:
    config = TrainConfig.model_validate({"model_name_or_path": "a", "dataset": "b", "output_dir": "c"})
    kept = kept_of(config, [], 1)
    unlisted = {"kt_ep_timeout", "max_steps", "num_train_epochs", "overwrite_output_dir", "resume_from_checkpoint"}
    one_value = {"kt_use_wrapper"}
    listed = set(kept["altering"]) | set(kept["others"])
    assert listed == set(TrainConfig.model_fields) - unlisted - one_value - {"kt_tp_enabled"}
