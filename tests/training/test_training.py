"""Whole trainings from their configuration: loss, stock peft beside the engine, resuming, acceptance, examples."""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ktverify.system.files import ROOT
from ktverify.training import curves, output_directory, run
from ktverify.training.acceptance import verify_training
from ktverify.training.config import TrainConfig, read_config
from ktverify.training.dataset import example_data, read_records
from ktverify.training.pretrained import load_tokenizer
from ktverify.training.run import Memory, TrainingSummary, measure_memory, measure_throughput
from ktverify.training.tiny import make_tiny
from ktverify.training.trainer import LossLog
from tests.support.command_line import call, ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
EXAMPLES = ROOT / "examples"
FAMILIES = {"deepseek_v2": "deepseek2", "qwen3_moe": "qwen3_moe"}
STEPS, HALF = 100, 50
# of everything but the experts: stock bf16 takes twice the time on a CPU without fast bf16, for the same curve to 2 %
DTYPE = "float32"


def config_of(example: str, model: Path, output: Path, **more: Any) -> TrainConfig:
    """examples/<example>.yaml for the checkpoint `model`; `more` are keys over it."""
    keys = {"model_name_or_path": model, "output_dir": output, "kt_num_threads": 1, **more}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return read_config(EXAMPLES / f"{example}.yaml", words)


def run_example(example: str, model: Path, output: Path, **more: Any) -> TrainingSummary:
    return run.run(config_of(example, model, output, **more), EXAMPLES).summary


class Made:
    """Tiny checkpoints, and finished trainings of the examples on them; each is made once."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def base(self, family: str) -> Path:
        path = self.home / family
        return path if path.exists() else make_tiny(family, path)

    def trained(self, family: str) -> Path:
        path = self.home / f"{family}-trained"
        if not path.exists():
            run_example(FAMILIES[family], self.base(family), path, torch_dtype=DTYPE)
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


# ---- the loss


def expect_close(*directories: Path) -> None:
    found = curves.compare(*map(curves.read_curve, directories))
    assert found.passed, f"{found.largest:.2%} at step {found.largest_at}"
    # two different programs: if they agree to the last digit, one of them did not run
    assert found.mean > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_halves_and_stock_peft_has_the_same_curve(family: str, made: Made, tmp_path: Path) -> None:
    engine = curves.read_curve(made.trained(family))
    assert engine.steps == tuple(range(1, STEPS + 1))
    assert engine.losses[-1] <= engine.losses[0] / 2
    run_example(FAMILIES[family], made.base(family), tmp_path / "stock", use_kt="false", torch_dtype=DTYPE)
    expect_close(tmp_path / "stock", made.trained(family))


def test_different_curves_are_distinguished(made: Made) -> None:
    curve = curves.read_curve(made.trained("deepseek_v2"))
    worse = curves.Curve(curve.steps, (*curve.losses[:40], curve.losses[40] * 1.051, *curve.losses[41:]))
    found = curves.compare(curve, worse)
    assert not found.passed
    assert found.largest_at == 41
    assert found.largest == pytest.approx(0.051)
    short = curves.Curve(curve.steps[:-1], curve.losses[:-1])
    with pytest.raises(ValueError, match="other steps: 1 are in one only, first 100"):
        curves.compare(curve, short)
    with pytest.raises(ValueError, match="loss of step 1 is not finite"):
        curves.compare(curve, curves.Curve(curve.steps, (float("nan"), *curve.losses[1:])))


def test_the_slope_is_fitted() -> None:
    steps = tuple(range(1, 11))
    # the end lies above the start, but the line falls
    losses = (1.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5)
    assert curves.Curve(steps, losses).slope < 0 < losses[-1] - losses[0]
    assert curves.Curve(steps, tuple(2.0 + 3.0 * step for step in steps)).slope == pytest.approx(3.0)


SHORT = {"max_steps": 3, "logging_steps": 1, "torch_dtype": DTYPE}


def test_accumulated_steps_have_the_losses_of_stock_peft(made: Made, tmp_path: Path) -> None:
    settings = {**SHORT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for name, use_kt in (("engine", "true"), ("stock", "false")):
        done = run_example("qwen3_moe", made.base("qwen3_moe"), tmp_path / name, use_kt=use_kt, **settings)
        assert done.steps == 3
    expect_close(tmp_path / "stock", tmp_path / "engine")
    state = json.loads((tmp_path / "engine" / curves.STATE_FILE).read_text(encoding="utf-8"))
    assert state["log_history"][0]["epoch"] == 4 / math.ceil(len(read_records(example_data())) / 2)


def test_checkpointing_dropout_rslora_and_a_tokenizer_without_padding(made: Made, tmp_path: Path) -> None:
    base = shutil.copytree(made.base("qwen3_moe"), tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(str(base), option="base").pad_token is None
    more = {"lora_dropout": 0.3, "use_rslora": "true", "save_steps": 1, "save_total_limit": 2}
    more["per_device_train_batch_size"] = 2
    for name, on in (("kept", "false"), ("recomputed", "true")):
        run_example("qwen3_moe", base, tmp_path / name, **SHORT, **more, gradient_checkpointing=on)
    kept, recomputed = (curves.read_curve(tmp_path / name) for name in ("kept", "recomputed"))
    # a forward that is computed again has the same bits, its dropout included
    assert kept == recomputed
    assert sorted(path.name for path in (tmp_path / "kept").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert json.loads((tmp_path / "kept" / "adapter_config.json").read_text(encoding="utf-8"))["use_rslora"] is True
    run_example("qwen3_moe", base, tmp_path / "plain", **SHORT, **{**more, "lora_dropout": 0.0, "save_steps": 10})
    plain = curves.read_curve(tmp_path / "plain")
    assert plain.losses[0] == kept.losses[0]  # B is zero, so is what dropout changes
    assert plain.losses[2] != kept.losses[2]


# ---- stopping and going on


def test_a_resumed_training_equals_an_unbroken_one(made: Made, tmp_path: Path) -> None:
    whole = made.trained("qwen3_moe")
    stopped = tmp_path / "stopped"
    shutil.copytree(whole / f"checkpoint-{HALF}", stopped / f"checkpoint-{HALF}")
    rows = (whole / curves.LOSS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    # the run continued after its last checkpoint and died while it wrote a loss
    (stopped / curves.LOSS_FILE).write_text("".join(rows[: HALF + 7]) + rows[HALF + 7][:9], encoding="utf-8")
    assert curves.read_curve(stopped).steps[-1] == HALF + 7
    # a second run was killed while it wrote the next checkpoint
    torn = stopped / f"checkpoint-{HALF + 10}"
    shutil.copytree(whole / f"checkpoint-{HALF}", torn)
    (torn / "optimizer.pt").write_bytes((torn / "optimizer.pt").read_bytes()[:1000])
    done = run_example("qwen3_moe", made.base("qwen3_moe"), stopped, resume_from_checkpoint="true", torch_dtype=DTYPE)
    assert done.steps == STEPS - HALF
    all_rows = [json.loads(row) for row in rows]
    assert done.tokens == all_rows[-1]["tokens"] - all_rows[HALF - 1]["tokens"]
    expected, actual = curves.read_curve(whole), curves.read_curve(stopped)
    assert actual.steps == expected.steps
    assert max(abs(a - b) for a, b in zip(actual.losses, expected.losses, strict=True)) <= 1e-6
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# what a user keeps in an output directory: no run may remove it
STRANGERS = ("mine/checkpoint-3/a", "checkpoint-best/a", "checkpoint-90-mine/a", ".saving-x/a")


def test_files_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    saving = f"{output_directory.SAVING}x/a"
    for name in ("checkpoint-10/optimizer.pt", "checkpoint-90/optimizer.pt", saving, *STRANGERS):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "adapter_model.backup").touch()
    (tmp_path / "checkpoint-7").symlink_to(tmp_path / "mine")
    for name in ("adapter_model.safetensors", curves.LOSS_FILE, "loss.png", "training.json", "notes.txt"):
        (tmp_path / name).touch()
    reached = tmp_path / "checkpoint-10"
    (reached / curves.STATE_FILE).write_text('{"global_step": 10}', encoding="utf-8")
    output_directory.remove_earlier_run(tmp_path, reached)
    assert not (tmp_path / "checkpoint-90").exists()
    assert (tmp_path / curves.LOSS_FILE).exists()
    assert reached.exists()
    output_directory.remove_earlier_run(tmp_path, None)
    left = {Path(name).parts[0] for name in STRANGERS}
    assert {path.name for path in tmp_path.iterdir()} == {*left, "notes.txt", "adapter_model.backup"}
    assert all((tmp_path / name).is_file() for name in STRANGERS)


def test_only_checkpoints_are_rotated(tmp_path: Path) -> None:
    for name in ("checkpoint-9/a", "checkpoint-10/a", "checkpoint-11/a", *STRANGERS):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    output_directory.remove_old_checkpoints(tmp_path, None)
    assert len(output_directory.checkpoints_in(tmp_path)) == 3
    output_directory.remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in output_directory.checkpoints_in(tmp_path)] == ["checkpoint-11", "checkpoint-10"]
    assert all((tmp_path / name).is_file() for name in STRANGERS)


def test_a_checkpoint_of_another_run_does_not_open_a_directory_in_use(made: Made, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    other = str(made.trained("qwen3_moe") / f"checkpoint-{HALF}")
    with pytest.raises(ValueError, match=r"is not empty: name another.*a checkpoint of"):
        output_directory.choose_start(tmp_path, other, overwrite=False)
    assert output_directory.choose_start(tmp_path, other, overwrite=True) == Path(other)
    assert output_directory.choose_start(Path(other).parent, other, overwrite=False) == Path(other)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        output_directory.choose_start(tmp_path, str(tmp_path / "checkpoint-7"), overwrite=True)


@pytest.mark.parametrize("killed_at", range(len(output_directory.CHECKPOINT_FILES)))
def test_an_incomplete_checkpoint_is_skipped(killed_at: int, made: Made, tmp_path: Path) -> None:
    older, newer = tmp_path / "checkpoint-50", tmp_path / "checkpoint-100"
    for path in (older, newer):
        shutil.copytree(made.trained("qwen3_moe") / path.name, path)
    assert output_directory.choose_checkpoint(True, tmp_path) == newer
    for name in output_directory.CHECKPOINT_FILES[killed_at + 1 :]:
        (newer / name).unlink()
    torn = newer / output_directory.CHECKPOINT_FILES[killed_at]
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    if killed_at == 0:  # peft writes the weights before their configuration
        torn.unlink()
    assert output_directory.choose_checkpoint(True, tmp_path) == older
    for name in output_directory.CHECKPOINT_FILES[killed_at:]:
        (newer / name).write_bytes(b"garbage")  # as a file system may leave a file after a crash
    assert output_directory.choose_checkpoint(True, tmp_path) == older
    shutil.rmtree(older)
    with pytest.raises(ValueError, match="no whole checkpoint to resume from; checkpoint-100: "):
        output_directory.choose_checkpoint(True, tmp_path)


# ---- acceptance


def findings(directory: Path, base: Path) -> dict[str, bool | None]:
    return {finding.name: finding.passed for finding in verify_training(directory, str(base))}


def test_a_finished_training_is_accepted(made: Made) -> None:
    found = findings(made.trained("deepseek_v2"), made.base("deepseek_v2"))
    assert len(found) == 9
    assert all(found.values()), found
    for name in ("loss.jsonl", "loss.png", "training.json", "trainer_state.json"):
        assert (made.trained("deepseek_v2") / name).is_file()


def _with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")

    return damage


def _rising(directory: Path) -> None:
    rows = [json.dumps({"step": step, "loss": 1.0 + step / 10}) + "\n" for step in range(1, 6)]
    (directory / curves.LOSS_FILE).write_text("".join(rows), encoding="utf-8")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "files": lambda directory: (directory / "adapter_config.json").unlink(),
    "readable": lambda directory: (directory / "adapter_model.safetensors").write_bytes(b"torn"),
    "finite": _with_tensors(lambda t: next(iter(t.values())).view(-1)[0].fill_(float("nan"))),
    "trained": _with_tensors(lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n]),
    "loss": _rising,
    "keys": _with_tensors(lambda t: t.popitem()),
    "loads": _with_tensors(lambda t: t.update({n: v[:, :-1].contiguous() for n, v in t.items()})),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_question_fails_for_its_damage(what: str, made: Made, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(made.trained("deepseek_v2"), directory, ignore=shutil.ignore_patterns("checkpoint-*"))
    DAMAGES[what](directory)
    found = findings(directory, made.base("deepseek_v2"))
    assert found[what] is False, found
    if what == "trained":  # an adapter without effect generates what the base generates
        assert found["generation"] is False


def test_an_adapter_of_another_loop_is_asked_what_can_be_asked(made: Made, tmp_path: Path) -> None:
    directory = tmp_path / "own"
    directory.mkdir()
    for name in output_directory.ADAPTER_FILES:
        shutil.copyfile(made.trained("deepseek_v2") / name, directory / name)
    text = ends(call("verify-training", directory), 0)
    assert text.splitlines()[-1] == f"PASS {directory}: 8 of 8; not asked: loss"
    assert " lora_B moved, with norms from " in text
    settings = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    text = ends(call("verify-training", directory), 0)
    assert text.splitlines()[-1] == f"PASS {directory}: 4 of 4; not asked: loss, keys, loads, logits, generation"


def test_a_history_that_ends_early_is_no_history(made: Made, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(made.trained("deepseek_v2"), directory, ignore=shutil.ignore_patterns("checkpoint-*"))
    rows = (directory / curves.LOSS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    (directory / curves.LOSS_FILE).write_text("".join(rows[:-3]), encoding="utf-8")
    answers = {answer.name: answer.text for answer in verify_training(directory, str(made.base("deepseek_v2")))}
    assert answers["loss"] == "the history ends at step 97, the training at step 100"


# ---- memory and throughput


def test_every_command_has_the_losses_of_the_training(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # memory pads all batches to one length, so that it rounds, and draws dropout, elsewhere
    keys = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2, "lora_dropout": 0.1, "max_steps": 20}
    keys |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    config = config_of("minimal", made.base("deepseek_v2"), tmp_path / "out", **keys)
    whole = run.run(config, EXAMPLES).log.curve
    found = []
    original = run.run

    def kept(*arguments: Any, **options: Any) -> run.Trained:
        found.append(original(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(run, "run", kept)
    measure_throughput(config, EXAMPLES, steps=10)
    measure_memory(config, EXAMPLES, steps=10)
    throughput, memory = (done.log.curve for done in found)
    assert throughput.steps == memory.steps[:13] == whole.steps[:13]
    assert throughput.losses == whole.losses[:13]


def test_memory_does_not_grow(made: Made, tmp_path: Path) -> None:
    found = measure_memory(config_of("minimal", made.base("deepseek_v2"), tmp_path), EXAMPLES, steps=30)
    assert len(found.steps) >= 30
    assert 0 < found.loaded <= found.steps[-1]
    assert not found.leaks, found
    assert found.slope < 2**16, found  # 15 KiB a step is the most that such a run was seen to take
    assert found.waiting == 0
    assert Memory(found.loaded, found.steps, found.slope + 2**19).leaks
    assert Memory(found.loaded, found.steps, found.slope, waiting=1).leaks


def _pages() -> mmap.mmap:
    found = mmap.mmap(-1, 2**18)
    found.write(os.urandom(2**18))
    return found


@pytest.mark.parametrize(
    "allocate",
    [_pages, lambda: os.urandom(2**18), lambda: [os.urandom(2**12) for _ in range(64)], lambda: torch.ones(2**16)],
    ids=["pages", "a block", "many blocks", "a tensor"],
)
def test_a_planted_leak_is_found(
    allocate: Callable[[], Any], made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    original = LossLog.on_step_end

    def leaking(self: LossLog, *given: Any, **more: Any) -> None:
        kept.append(allocate())
        original(self, *given, **more)

    monkeypatch.setattr(LossLog, "on_step_end", leaking)
    found = measure_memory(config_of("minimal", made.base("deepseek_v2"), tmp_path, max_steps=60), EXAMPLES)
    assert found.leaks, found
    assert len(found.steps) == run.MORE * 10


def test_throughput_is_the_median_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"tokens_per_s": rate} for rate in (1.0, 1.0, 1.0, 40.0, 10.0, 30.0, 20.0)]

    def few(config: TrainConfig, beside: Path, *, first_steps: int, **more: Any) -> SimpleNamespace:
        assert more.keys() == {"during"}  # neither padded nor prolonged
        assert first_steps == len(rows)
        return SimpleNamespace(log=SimpleNamespace(rows=rows))

    monkeypatch.setattr(run, "run", few)
    config = TrainConfig.model_validate({"model_name_or_path": "a", "dataset": "b", "output_dir": "c"})
    assert measure_throughput(config, EXAMPLES, steps=4) == 25.0


# ---- the examples


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_every_example_runs(example: str, made: Made, tmp_path: Path) -> None:
    document = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8"))
    family = Path(document["model_name_or_path"]).name
    # as many workers as the example says, where it says so
    threads = document.get("kt_num_threads") or 1
    more = {"max_steps": 3, "logging_steps": 10, "kt_num_threads": threads}
    done = run_example(example, made.base(family), tmp_path / "out", **more)
    assert done.steps == 3
    assert 0 < done.last_loss < math.inf
    assert done.tokens > 0
    summary = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert summary["last_loss"] == done.last_loss
    assert summary["slope"] is None  # one step was logged, the last
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_full_has_every_key() -> None:
    document = yaml.safe_load((EXAMPLES / "full.yaml").read_text(encoding="utf-8"))
    assert set(document) == set(TrainConfig.model_fields)
    other = {name for name, field in TrainConfig.model_fields.items() if document[name] != field.default}
    # its header names the same ones; lora_alpha is what its default, 2 lora_rank, comes to
    assert other == {
        *("model_name_or_path", "dataset", "output_dir"),
        *("max_steps", "learning_rate", "per_device_train_batch_size", "logging_steps", "save_steps", "lora_alpha"),
    }
    assert document["lora_alpha"] == 2 * document["lora_rank"]
