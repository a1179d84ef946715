"""Configurations as LLaMA-Factory publishes them, and keys that are checked before anything is loaded or made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktverify.errors import WrongKeys
from ktverify.training import run
from ktverify.training.config import TrainConfig, read_config
from ktverify.training.tiny import make_tiny
from tests.support.command_line import call, ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
# the keys and values of its published LoRA examples, with a model and data that are here
PUBLISHED: dict[str, Any] = yaml.safe_load("""
model_name_or_path: tiny
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: alpaca_tiny, alpaca_tiny
template: deepseek
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
weight_decay: 0.01
max_grad_norm: 1.0
flash_attn: auto
enable_liger_kernel: false
deepspeed: null
use_kt: true
kt_optimize_rule: rules/DeepSeek-V2-Lite-Chat-sft-amx.yaml
cpu_infer: 2
chunk_size: 8192
""")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("base") / "qwen3_moe")


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(**keys: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(keys))
        return path

    return write


def test_a_published_file_is_read_and_what_is_not_used_is_said(written: Callable[..., Path]) -> None:
    config = read_config(written(**PUBLISHED))
    assert (config.max_samples, config.weight_decay, config.kt_num_threads) == (1000, 0.01, 2)
    assert (config.learning_rate, config.datasets) == (1e-4, ["alpaca_tiny", "alpaca_tiny"])
    said = {note.partition(":")[0] for note in config.notes if " is not used: " in note}
    assert said == {
        *("overwrite_cache", "dataloader_num_workers", "ddp_timeout", "plot_loss", "report_to", "chunk_size"),
        *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "kt_optimize_rule"),
    }
    assert "cpu_infer: 2 is used as kt_num_threads" in config.notes
    assert any(note.startswith("template 'deepseek' is not looked up") for note in config.notes)


def test_a_published_file_trains(base: Path, tmp_path: Path, written: Callable[..., Path]) -> None:
    keys = PUBLISHED | {"model_name_or_path": str(base), "output_dir": str(tmp_path / "out"), "max_samples": 5}
    text = ends(call("train", written(**keys), "--num_train_epochs", "2"), 0)
    assert "4 steps" in text  # 10 examples in batches of 8, twice


# of LLaMA-Factory's published files for other stages, for merging and for inference, which people put together
OTHERS: dict[str, Any] = yaml.safe_load("""
ref_model: null
ref_model_adapters: null
reward_model_quantization_bit: null
export_dir: output/merged
export_size: 5
export_device: cpu
export_legacy_format: false
infer_backend: huggingface
vllm_enforce_eager: true
vllm_gpu_util: 0.9
sglang_mem_fraction: 0.9
use_fast_tokenizer: true
upcast_lmhead_output: false
use_v1_kernels: false
device_map: auto
init_special_tokens: noise_init
swanlab_api_key: null
metric_for_best_model: loss
greater_is_better: false
bf16_full_eval: true
gradient_checkpointing_kwargs: {use_reentrant: false}
full_determinism: false
ignore_data_skip: false
tf32: null
use_cpu: false
ddp_static_graph: null
save_on_each_node: false
optim_args: null
label_names: null
project: huggingface
galore_update_interval: 200
badam_switch_interval: 50
apollo_scale: 32.0
oft_rank: 0
enable_torch_profiler: false
profiler_output_dir: null
""")


def test_keys_of_other_files_are_known(written: Callable[..., Path]) -> None:
    config = read_config(written(**PUBLISHED | OTHERS))
    assert any(
        note.startswith("export_dir: output/merged is not used: a training exports nothing") for note in config.notes
    )
    bad = {"tf32": True, "device_map": "balanced", "use_cpu": True, "optim_args": "a=1", "enable_torch_profiler": True}
    with pytest.raises(WrongKeys) as found:
        read_config(written(**PUBLISHED | bad))
    assert [line.split()[1] for line in found.value.lines] == sorted(bad)
    assert not any("unknown" in line for line in found.value.lines)


REFUSED: dict[str, Any] = yaml.safe_load("""
deepspeed: examples/ds_z3.json
fsdp: full_shard
val_size: 0.1
quantization_bit: 4
flash_attn: fa2
fp16: true
use_dora: true
packing: true
adapter_name_or_path: saves/y
save_only_model: true
enable_liger_kernel: true
lora_rnak: 8
lora_rank: 0
stage: dpo
""")


def test_all_keys_that_cannot_be_used_are_listed_at_once(tmp_path: Path, written: Callable[..., Path]) -> None:
    path = written(**PUBLISHED | REFUSED)
    with pytest.raises(WrongKeys) as found:
        read_config(path)
    lines = found.value.lines
    assert len(lines) == len(REFUSED)
    assert all(any(key in line for line in lines) for key in REFUSED)
    result = call("train", path)
    ends(result, 2)
    assert result.stderr.splitlines() == [*lines, f"error: {path} cannot be used for the {len(lines)} reasons above"]
    assert not (tmp_path / "saves").exists()


@pytest.mark.parametrize("key", ["hub_token", "hf_hub_token", "swanlab_api_key", "swanlab_lark_secret"])
def test_a_note_tells_no_secret(key: str, written: Callable[..., Path]) -> None:
    (note,) = read_config(written(model_name_or_path="a", dataset="b", output_dir="c", **{key: "hf_abc"})).notes
    assert note.startswith(f"{key}: … is not used")


@pytest.mark.parametrize("value", ["a\nb\x1b[31m", "x" * 10_000, list(range(5000)), {"a": "\u2028"}])
def test_a_note_is_one_short_line(value: object, written: Callable[..., Path]) -> None:
    given = {"model_name_or_path": "a", "dataset": "b", "output_dir": "c", "kt_optimize_rule": value}
    (note,) = read_config(written(**given)).notes
    assert note.startswith("kt_optimize_rule: ")
    assert "is not used" in note
    assert note.isprintable()
    assert len(note) < 400


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_rnak", "; did you mean lora_rank?"),
        ("learningrate", "; did you mean learning_rate?"),
        ("overwrite_caches", "; did you mean overwrite_cache? It is not used: there is no cache"),
        ("max_len", "; did you mean max_length? It is not used: a training generates nothing"),
        ("batch_size", "; did you mean per_device_train_batch_size?"),
        ("epochs", "; did you mean num_train_epochs?"),
        ("dropout", "; did you mean lora_dropout?"),
        # nothing is near: no hint is better than one that misleads
        *((key, "; docs/training.md lists the keys") for key in ("weights", "deep", "path", "steps", "x", "lr")),
    ],
)
def test_a_hint_names_what_is_near_or_nothing(key: str, hint: str, written: Callable[..., Path]) -> None:
    with pytest.raises(WrongKeys, match=rf"unknown key '{key}'") as found:
        read_config(written(model_name_or_path="a", dataset="b", output_dir="c", **{key: 1}))
    assert str(found.value).endswith(hint)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "cosine_with_min_lr cannot be used: One of min_lr or",
        ),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, "cosine_warmup_with_min_lr cannot be used: One of min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay cannot be used: .*num_decay_steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau needs evaluations, and there are none"),
        ({"lr_scheduler_type": "greedy"}, "greedy needs evaluations"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "linear with lr_scheduler_kwargs .* cannot be used: .*nonsense"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, "polynomial cannot be used: lr_end"),
        ({"lr_scheduler_kwargs": {"last_epoch": 3}}, "linear with lr_scheduler_kwargs .* cannot be used: .*initial_lr"),
        ({"learning_rate": float("inf")}, "learning_rate got inf"),
        ({"learning_rate": 10**400}, "learning_rate got 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha got nan"),
        *(
            (
                {"lora_alpha": alpha, "use_rslora": rslora},
                r"lora_alpha is \S+; with lora_rank 8 it takes a positive number",
            )
            for alpha, rslora in ((1e308, False), (1e-300, False), (2e39, True))
        ),
        ({"lora_rank": 2**31 - 1}, "lora_rank is 2147483647; it takes a positive number, at most"),
        ({"dataset": " , "}, "dataset got ' , ': it takes the names of data sets"),
        ({"dataset": []}, r"dataset got \[\]"),
        ({"num_train_epochs": 1e30}, "num_train_epochs got 1e"),
        ({"max_steps": 0}, "max_steps got 0: it takes 1 or more, or -1"),
        ({"max_steps": -7}, "max_steps got -7"),
        ({"seed": 2**32}, "seed got 4294967296"),
        ({"per_device_train_batch_size": 10**30}, "per_device_train_batch_size got 1000"),
        ({"save_steps": 0.5}, "save_steps got 0.5"),
        ({"lora_target": "q_porj"}, "lora_target has 'q_porj', which this model has not; did you mean q_proj"),
        ({"lora_target": []}, "lora_target is empty"),
        ({"lora_target": "gate_proj"}, "lora_target has one of gate_proj and up_proj"),
        ({"kt_tp_enabled": True, "kt_tp_count": 7}, "must be a multiple of threadpool_count"),
        ({"output_dir": "{file}/out"}, "output_dir .* cannot be made: .*file is a file"),
        ({"output_dir": "$NOWHERE/out"}, r"output_dir got .* has the variable \$NOWHERE, which is not set"),
        ({"output_dir": ""}, "output_dir got ''"),
        ({"output_dir": "a\0b"}, "output_dir got .* has a NUL character; a path takes none"),
        ({"bf16": True, "torch_dtype": "float32"}, "bf16 is true and torch_dtype float32"),
        ({"cpu_infer": 3, "kt_num_threads": 2}, "cpu_infer 3 and kt_num_threads 2 are the same key"),
    ],
)
def test_every_value_is_checked_before_the_model_is_loaded(
    keys: dict[str, Any],
    wanted: str,
    base: Path,
    tmp_path: Path,
    written: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "load_model", None)
    given = {"model_name_or_path": str(base), "dataset": "alpaca_tiny", "output_dir": str(tmp_path / "out")}
    given |= {key: str(tmp_path / "file" / "out") if value == "{file}/out" else value for key, value in keys.items()}
    with pytest.raises((ValueError, RuntimeError), match=wanted):
        run.run(read_config(written(**given)), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("cosine_with_min_lr", "{min_lr: 1e-5}"),
    ],
)
def test_schedulers_get_their_arguments(
    scheduler: str, arguments: dict[str, Any] | str, base: Path, tmp_path: Path, written: Callable[..., Path]
) -> None:
    keys: dict[str, Any] = {"model_name_or_path": str(base), "dataset": "alpaca_tiny", "cutoff_len": 32}
    keys |= {
        "output_dir": str(tmp_path / "out"),
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": arguments,
        "warmup_steps": 1,
    }
    path = written(**keys)
    if isinstance(arguments, str):  # as people write it
        path.write_text(path.read_text().replace(f"'{arguments}'", arguments))
    config = read_config(path, ["--max_steps", "4", "--logging_steps", "1"])
    from ktverify.training.schedule import learning_rates

    rate = learning_rates(config, 4)
    rows = run.run(config, tmp_path).log.rows
    assert [row["learning_rate"] for row in rows] == pytest.approx([rate(step) for step in range(4)])


def test_the_defaults_are_those_of_transformers() -> None:
    config = TrainConfig.model_validate({"model_name_or_path": "a", "dataset": "b", "output_dir": "c"})
    from transformers import TrainingArguments

    theirs = TrainingArguments(output_dir="c")
    for name in ("weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "seed"):
        assert getattr(config, name) == getattr(theirs, name)
