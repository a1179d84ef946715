"""One training with transformers' own Trainer.

It leaves an output directory with the adapter, checkpoints, loss.jsonl, loss.png and training.json.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SchedulerType

from ktverify.system.files import write_whole
from ktverify.training import curves, output_directory
from ktverify.training.adapter import add_adapter, lora_config
from ktverify.training.config import TrainConfig
from ktverify.training.dataset import IGNORED, encode, find_dataset, read_records
from ktverify.training.layer import init_cpu_infer
from ktverify.training.loss_log import LossLog
from ktverify.training.pretrained import BASE_OPTION, load_model, load_tokenizer
from ktverify.training.wrap import wrap_moe_layers

# keys that the Trainer's arguments have under the same name
_SAME_KEYS = (
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps"),
    *("logging_steps", "save_steps", "save_total_limit", "seed"),
)


@dataclass(frozen=True)
class TrainingSummary:
    """Losses (nats per token) and slope (per step) of the whole history; steps, tokens, seconds and peak resident bytes
    of this process, so that a resumed run counts only its own."""

    steps: int
    first_loss: float
    last_loss: float
    slope: float
    tokens: int
    seconds: float
    tokens_per_s: float
    peak_rss: int


@dataclass(frozen=True)
class Trained:
    """A finished training: its summary, its loss log and the model with the adapter."""

    summary: TrainingSummary
    log: LossLog
    model: Any


def train(config: TrainConfig, beside: Path) -> TrainingSummary:
    """Run the training that `config` describes and return its summary; see `run`."""
    return run(config, beside).summary


def run(config: TrainConfig, beside: Path, *, one_length: bool = False) -> Trained:
    """Run the training that `config` describes; relative data paths are also searched in the directory `beside`.

    one_length pads every batch to the longest example, because torch keeps memory for each shape that it has seen.
    ValueError in one line for what cannot be run, before the model is loaded where that is possible.
    """
    output = Path(config.output_dir)
    start = output_directory.choose_start(output, config.resume_from_checkpoint, config.overwrite_output_dir)
    arguments = _arguments(config)
    if config.template_note:
        print(config.template_note, file=sys.stderr)
    records = read_records(find_dataset(config.dataset, beside))
    infer = None
    if config.use_kt:
        infer = init_cpu_infer(config.kt_num_threads, config.tp, backend=config.kt_backend)
    path, trust = config.model_name_or_path, config.trust_remote_code
    tokenizer = load_tokenizer(path, option=BASE_OPTION, trust=trust)
    _ensure_padding(tokenizer)
    rows = encode(records, tokenizer, config.cutoff_len, workers=config.preprocessing_num_workers or 1)
    model = load_model(path, config.torch_dtype, option=BASE_OPTION, trust=trust)
    if infer is not None:
        wrap_moe_layers(model, infer)
    torch.manual_seed(config.seed)
    settings = lora_config(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        target=config.lora_target,
        rslora=config.use_rslora,
    )
    adapted = add_adapter(model, settings, dropout=config.lora_dropout)
    log = LossLog(output)
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=rows,
        data_collator=_collator(tokenizer, max(len(row["input_ids"]) for row in rows) if one_length else None),
        processing_class=tokenizer,
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)  # the loss log prints a shorter line
    output_directory.remove_earlier_run(output, start)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        seconds = time.perf_counter() - started
        _save_whole((adapted, tokenizer), trainer.state, output)
    except KeyboardInterrupt:
        for callback in trainer.callback_handler.callbacks:
            if bar := getattr(callback, "training_bar", None):
                bar.close()  # on a terminal it would be drawn again after the line
        # max_steps may be unknown before the first step
        done = trainer.state.global_step
        reached = f"at step {done} of {trainer.state.max_steps}" if done else "before the first step"
        raise KeyboardInterrupt(f"stopped {reached}; {output_directory.resume_hint(output)}") from None
    return Trained(_conclude(trainer, log, seconds, output), log, adapted)


def base_of(adapter: Path, base: str | None) -> str:
    """The base model's path: `base`, else the one that the adapter names. ValueError where neither is."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise ValueError(f"{adapter} holds no adapter: adapter_config.json is missing")
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise ValueError(f"{config} is no JSON: {error}") from None
    path = base or named
    if not path:
        raise ValueError(f"{adapter} does not name its base model: give --base")
    return str(path)


def _ensure_padding(tokenizer: Any) -> None:
    """Let a tokenizer without a padding token pad with its end token, as LLaMA-Factory does; labels and the attention
    mask leave padding out. ValueError for a tokenizer with neither token."""
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {BASE_OPTION} has neither a padding nor an end token; give it one")
    tokenizer.pad_token = tokenizer.eos_token


def _arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's arguments. ValueError for what it would refuse, and for several GPUs: it would split a batch over
    copies of the model, and the engine's layers cannot be copied."""
    schedulers = [kind.value for kind in SchedulerType]
    if config.lr_scheduler_type not in schedulers:
        raise ValueError(f"lr_scheduler_type is {config.lr_scheduler_type!r}, it takes one of {', '.join(schedulers)}")
    found = _trainer_arguments(config)
    if found.n_gpu > 1:
        raise ValueError(
            f"{found.n_gpu} GPUs are visible, a training takes one: choose it by CUDA_VISIBLE_DEVICES, like "
            "CUDA_VISIBLE_DEVICES=0"
        )
    return found


def _trainer_arguments(config: TrainConfig) -> TrainingArguments:
    return TrainingArguments(
        **{name: getattr(config, name) for name in _SAME_KEYS},
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )


def _save_whole(parts: tuple[Any, ...], state: Any, output: Path) -> None:
    """`save_pretrained` of each of `parts` and the Trainer's state into `output`; every file appears whole, the
    adapter's weights last."""
    with tempfile.TemporaryDirectory(prefix=output_directory.SAVING, dir=output) as saving:
        for part in parts:
            part.save_pretrained(saving)
        state.save_to_json(str(Path(saving) / curves.STATE_FILE))
        files = sorted(Path(saving).iterdir(), key=lambda path: path.suffix == ".safetensors")
        for path in files:
            os.replace(path, output / path.name)


def _collator(tokenizer: Any, length: int | None) -> DataCollatorForSeq2Seq:
    padding = "longest" if length is None else "max_length"
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, padding=padding, max_length=length)


def _conclude(trainer: Trainer, log: LossLog, seconds: float, output: Path) -> TrainingSummary:
    history = [(row["step"], row["loss"]) for row in log.rows]
    curve = curves.Curve(tuple(step for step, _ in history), tuple(loss for _, loss in history))
    tokens = int(trainer.state.num_input_tokens_seen) - log.begun[1]
    summary = TrainingSummary(
        steps=int(trainer.state.global_step) - log.begun[0],
        first_loss=curve.losses[0] if history else math.nan,
        last_loss=curve.losses[-1] if history else math.nan,
        slope=curve.slope,
        tokens=tokens,
        seconds=round(seconds, 2),
        tokens_per_s=round(tokens / seconds, 1),
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    known = {name: None if math.isnan(value) else value for name, value in asdict(summary).items()}  # JSON has no nan
    write_whole(output / output_directory.SUMMARY_FILE, json.dumps(known, indent=2) + "\n")
    if history:
        curves.draw({"loss": curve}, output / output_directory.LOSS_PICTURE)
    return summary
