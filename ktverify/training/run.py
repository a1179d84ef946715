"""One training with transformers' own Trainer; and a few steps of one, for the commands memory and throughput.

A training leaves an output directory with the adapter, checkpoints, loss.jsonl, loss.png and training.json.
"""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ktverify.engines.argument_checks import LayerSpec
from ktverify.engines.expert_parallel import Ranks
from ktverify.errors import NotFinite
from ktverify.runs.jsonl import to_json
from ktverify.system.files import write_whole
from ktverify.training import curves, memory_trend, output_directory, pretrained, resume
from ktverify.training.adapter import add_adapter, lora_config
from ktverify.training.config import TrainConfig
from ktverify.training.dataset import IGNORED, encode, find_dataset, read_records
from ktverify.training.gpu_experts import gpu_experts_of
from ktverify.training.infer import CpuInfer, init_cpu_infer
from ktverify.training.pretrained import BASE_OPTION, check_method, load_form, load_model, load_tokenizer
from ktverify.training.ranks import Divided, agreed, of_all, output_of, ranks_of
from ktverify.training.schedule import check_schedule
from ktverify.training.trainer import Enough, FiniteParameters, LossLog, LossTrainer, Rotation
from ktverify.training.wrap import find_experts, require_one_process, wrap_moe_layers

# what shows a text while its body runs
During = Callable[[str], contextlib.AbstractContextManager[object]]
# keys that the Trainer's arguments have under the same name
_SAME_KEYS = (
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("learning_rate", "weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "num_train_epochs", "max_steps"),
    *("logging_steps", "save_steps", "seed"),
)
_SOME_STEPS = 1000  # a schedule is checked with so many where the examples decide how many there are
MORE = 4  # times the steps that were asked for, to see whether memory becomes calm
WARMUP = 3  # steps that do not count for memory and throughput: pages are touched and experts packed in them


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
    """A finished training: its summary, its loss log and the model with the adapter.

    note: why nothing was trained, "" for a training; without a training there is no model. first: of several processes,
    whether this is the one that writes and prints."""

    summary: TrainingSummary
    log: LossLog
    model: Any
    note: str = ""
    first: bool = True


def run(
    config: TrainConfig,
    beside: Path,
    *,
    first_steps: int | None = None,
    one_length: bool = False,
    enough: Enough | None = None,
    during: During = contextlib.nullcontext,
) -> Trained:
    """Run the training that `config` describes; relative data paths are also searched in the directory `beside`.

    first_steps: train only so many of its steps, as the whole training has them, and more until `enough` is true of
    the resident bytes after every step. one_length pads every batch to the longest example, because torch keeps memory
    for each shape that it has seen; the losses are the same but for rounding. during: shows what is done before the
    first step. With kt_ep, all processes of torchrun call it.
    ValueError in one line for what cannot be run, before the model is loaded where that is possible; RankLost where
    another process ended.
    """
    with ranks_of(config) as ranks, output_of(config, ranks) as own:
        during = during if ranks is None or ranks.rank == 0 else contextlib.nullcontext
        with agreed(ranks), during("reading the data"):
            plan = _prepared(of_all(config, ranks), beside, ranks, own, first_steps)
        if plan.start is not None and output_directory.step_reached(plan.start) >= plan.total:
            if ranks is None or ranks.rank == 0:
                return _nothing_to_train(Path(config.output_dir), plan.start, plan.total)
            log = LossLog(Path(own))
            return Trained(_summary(log, 0, 0, 0.0), log, None, "nothing to train", first=False)
        with agreed(ranks), during("loading the model"):
            model = _adapted(plan)
        return _train(plan, model, LossLog(Path(own), plan.kept, first_steps, enough), one_length)


@dataclass(frozen=True)
class _Prepared:
    """A training before its model is loaded. config: of all ranks. start: the checkpoint to resume from. total: all
    steps. kept: what checkpoints keep."""

    config: TrainConfig
    ranks: Ranks | None
    start: Path | None
    arguments: TrainingArguments
    infer: CpuInfer | None
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    total: int
    kept: dict[str, Any]


def _prepared(config: TrainConfig, beside: Path, ranks: Ranks | None, own: str, first_steps: int | None) -> _Prepared:
    """own: the directory that this process writes to. ValueError for what cannot be run."""
    output = Path(config.output_dir)
    if output.resolve() == Path(config.model_name_or_path).resolve():
        raise ValueError(f"output_dir {output} is the model's own directory: name another, so that its files stay")
    start = output_directory.choose_start(output, config.resume_from_checkpoint, config.overwrite_output_dir)
    check_schedule(config, config.max_steps if config.max_steps > 0 else _SOME_STEPS)
    # gradients of several ranks are clipped by their common norm, which the Trainer does not know
    ours: dict[str, Any] = {} if ranks is None else {"output_dir": own, "max_grad_norm": 0.0}
    arguments = _arguments(config.model_copy(update=ours))
    for note in config.notes:
        print(note, file=sys.stderr)
    files = [find_dataset(name, beside) for name in config.datasets]
    records = [record for file in files for record in read_records(file, config.max_samples)]
    infer = None
    if config.use_kt:
        infer = init_cpu_infer(
            config.kt_num_threads,
            config.tp,
            backend=config.kt_backend,
            weight_path=config.kt_weight_path,
            gpu=gpu_experts_of(config),
            numa_nodes=config.kt_numa_nodes,
        )
    _check_form(config, infer, in_files=ranks is not None)
    tokenizer = load_tokenizer(config.model_name_or_path, option=BASE_OPTION, trust=config.trust_remote_code)
    pretrained.ensure_padding(tokenizer)
    rows = encode(records, tokenizer, config.cutoff_len, workers=config.preprocessing_num_workers or 1)
    total = total_steps(config, len(rows))
    if first_steps is not None and first_steps > total:
        raise ValueError(
            f"the training has {total} steps, {WARMUP} of which warm up: give --steps {total - WARMUP} or less"
            if total > WARMUP
            else f"the training has {total} steps, and {WARMUP} are needed to warm up: give a larger max_steps"
        )
    kept = resume.kept_of(config, rows, total, 1 if ranks is None else ranks.size)
    if start is not None:
        reached = output_directory.step_reached(start)
        if accepted := resume.changes(output_directory.kept_in(start), kept, config, reached):
            print(f"changed since {start}, without effect on the steps: {accepted}", file=sys.stderr)
    return _Prepared(config, ranks, start, arguments, infer, tokenizer, rows, total, kept)


def _adapted(plan: _Prepared) -> Any:
    """The model with a fresh adapter, its experts in the engine; of several ranks each has its own."""
    config, ranks, infer = plan.config, plan.ranks, plan.infer
    path, trust, divided = config.model_name_or_path, config.trust_remote_code, ranks is not None
    model = load_model(path, config.torch_dtype, option=BASE_OPTION, trust=trust, infer=infer, in_files=divided)
    if infer is not None:
        wrap_moe_layers(model, infer, expert_parallel=None if ranks is None else ranks.group)
    torch.manual_seed(config.seed)
    rank, alpha, target = config.lora_rank, config.lora_alpha, config.lora_target
    settings = lora_config(model, rank=rank, alpha=alpha, target=target, rslora=config.use_rslora)
    return add_adapter(model, settings, dropout=config.lora_dropout)


def _train(plan: _Prepared, adapted: Any, log: LossLog, one_length: bool) -> Trained:
    config, start, output = plan.config, plan.start, log.path.parent
    longest = max(len(row["input_ids"]) for row in plan.rows)
    padding = {"padding": "max_length", "max_length": longest} if one_length else {"padding": "longest"}
    finite = [FiniteParameters()] if config.stop_on_nan else []
    trainer = LossTrainer(
        log=log,
        stop_on_nan=config.stop_on_nan,
        divided=None if plan.ranks is None else Divided(adapted, plan.ranks),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed if config.lora_dropout else None,
        model=adapted,
        args=plan.arguments,
        train_dataset=plan.rows,
        data_collator=DataCollatorForSeq2Seq(plan.tokenizer, label_pad_token_id=IGNORED, **padding),
        processing_class=plan.tokenizer,
        callbacks=[*finite, log, Rotation(output, config.save_total_limit)],
    )
    trainer.remove_callback(PrinterCallback)  # the loss log prints a shorter line
    output_directory.remove_earlier_run(output, start)
    started = time.perf_counter()
    try:
        with output_directory.writing(output):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        seconds, done = time.perf_counter() - started, int(trainer.state.global_step)
        with output_directory.files_together(output) as saving:
            for part in (trainer.model, trainer.processing_class):
                part.save_pretrained(str(saving))
            trainer.state.save_to_json(str(saving / curves.STATE_FILE))
    except NotFinite as error:
        _close_bar(trainer)
        last = output_directory.checkpoints_in(output)
        before = f"{last[0]} is from before it; " if last else ""
        more = f"see {log.path}; {before}try a smaller learning_rate; stop_on_nan: false goes on all the same"
        raise NotFinite(f"stopped at {error}; {more}") from error
    except KeyboardInterrupt:
        _close_bar(trainer)
        # max_steps may be unknown before the first step
        done = trainer.state.global_step
        where = f"at step {done} of {trainer.state.max_steps}" if done else "before the first step"
        raise KeyboardInterrupt(f"stopped {where}; {output_directory.resume_hint(output)}") from None
    tokens = int(trainer.state.num_input_tokens_seen) - log.begun[1]
    summary = _summary(log, done - log.begun[0], tokens, seconds)
    first = plan.ranks is None or plan.ranks.rank == 0
    if first:
        _write_summary(summary, log, output)
    return Trained(summary, log, adapted, first=first)


def _check_form(config: TrainConfig, infer: CpuInfer | None, *, in_files: bool = False) -> None:
    """ValueError for a model that the engine cannot compute, for a TP degree, a rank, a scaling or a checkpoint that it
    does not take, and for a lora_target that the model has not; without its weights, which may take long to load."""
    trust = config.trust_remote_code
    form = load_form(config.model_name_or_path, config.torch_dtype, option=BASE_OPTION, trust=trust)
    rank = config.lora_rank
    if infer is not None:
        blocks = find_experts(form)
        infer.gpu.check([int(block.down_proj.shape[0]) for block in blocks])  # type: ignore[index]
        for block in blocks:
            experts, hidden, intermediate = block.down_proj.shape  # type: ignore[misc]
            LayerSpec(
                num_experts=experts,
                num_experts_per_tok=1,  # the router's, which the first forward shows
                hidden_size=hidden,
                moe_intermediate_size=intermediate,
                cpuinfer_threads=infer.threads,
                threadpool_count=infer.tp,
                lora_rank=rank,
                lora_alpha=config.alpha * (math.sqrt(rank) if config.use_rslora else 1.0),
            )
        if note := check_method(form.config, infer, in_files=in_files):
            print(note, file=sys.stderr)
    lora_config(form, rank=rank, alpha=config.lora_alpha, target=config.lora_target)


def _close_bar(trainer: LossTrainer) -> None:
    """Close the bar of progress; on a terminal it would be drawn again after the last line."""
    for callback in trainer.callback_handler.callbacks:
        if bar := getattr(callback, "training_bar", None):
            bar.close()


def _arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's arguments. ValueError for what it would refuse, and for several GPUs: it would split a batch over
    copies of the model, and the engine's layers cannot be copied."""
    found = TrainingArguments(
        **{name: getattr(config, name) for name in _SAME_KEYS},
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        warmup_steps=config.warmup_steps or config.warmup_ratio,  # below 1 it is a share of all steps
        lr_scheduler_kwargs=dict(config.lr_scheduler_kwargs) or None,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    if found.n_gpu > 1:
        raise ValueError(
            f"{found.n_gpu} GPUs are visible, a training takes one: choose it by CUDA_VISIBLE_DEVICES, like "
            "CUDA_VISIBLE_DEVICES=0"
        )
    return found


def total_steps(config: TrainConfig, examples: int) -> int:
    """The steps of a whole training on so many examples, as the Trainer counts them; also resumed, from its start."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(examples / config.per_device_train_batch_size)
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


def _nothing_to_train(output: Path, start: Path, total: int) -> Trained:
    """What is left to do where the checkpoint `start` is at the last step or beyond it: nothing, or the files that a
    run which was stopped at its end had not written yet."""
    step = output_directory.step_reached(start)
    log = LossLog(output)
    log.read(step)
    summary = _summary(log, 0, 0, 0.0)
    if step > total:
        note = f"{start} is at step {step}, this configuration ends at step {total}; no file is changed"
    elif output_directory.is_finished(output, start):
        note = f"{output} is finished, at step {step} of {total}; no file is changed"
    else:
        output_directory.remove_earlier_run(output, start)
        log.write()
        output_directory.adopt(start, output)
        _write_summary(summary, log, output)
        note = f"{start} is at the last step, {total}; its adapter is now in {output}"
    return Trained(summary, log, None, f"nothing to train: {note}")


def _summary(log: LossLog, steps: int, tokens: int, seconds: float) -> TrainingSummary:
    curve = log.curve
    return TrainingSummary(
        steps=steps,
        first_loss=curve.losses[0] if curve.losses else math.nan,
        last_loss=curve.losses[-1] if curve.losses else math.nan,
        slope=curve.slope,
        tokens=tokens,
        seconds=round(seconds, 2),
        tokens_per_s=round(tokens / seconds, 1) if seconds else 0.0,
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _write_summary(summary: TrainingSummary, log: LossLog, output: Path) -> None:
    """The picture, and last the file that makes this a finished training."""
    if log.rows:
        curves.draw({"loss": log.curve}, output / output_directory.LOSS_PICTURE)
    known = asdict(summary) | ({} if len(log.rows) > 1 else {"slope": None})  # one line has no slope
    write_whole(output / output_directory.SUMMARY_FILE, to_json(known, indent=2) + "\n")


# ---- memory and throughput


@dataclass(frozen=True)
class Memory:
    """Resident bytes after loading and after each step that counts; slope: their calm_growth; waiting: saved forwards
    that wait for a backward in the engines at the end."""

    loaded: int
    steps: tuple[int, ...]
    slope: float
    waiting: int = 0

    @property
    def leaks(self) -> bool:
        return self.slope > memory_trend.MOST or self.waiting > 0


def measure_memory(
    config: TrainConfig, beside: Path, steps: int = 10, during: During = contextlib.nullcontext
) -> Memory:
    """Train for `steps` steps after WARMUP and measure the resident memory after each.

    Up to MORE times as many steps where memory is not calm by then, and the training has so many.
    """

    def calm(rss: Sequence[int]) -> bool:
        counted = rss[WARMUP:]
        return memory_trend.calm_growth(counted) <= memory_trend.MOST or len(counted) >= MORE * steps

    done = _few_steps(config, beside, steps, during=during, one_length=True, enough=calm)
    rss = done.log.rss[WARMUP:]
    waiting = sum(w.engine.saved_forwards for w in getattr(done.model, "_kt_wrappers", ()) if w.engine)
    return Memory(done.log.rss_before, tuple(rss), memory_trend.calm_growth(rss), waiting)


def measure_throughput(
    config: TrainConfig, beside: Path, steps: int = 10, during: During = contextlib.nullcontext
) -> float:
    """Tokens per second, padding left out, over `steps` steps after WARMUP: the median step's."""
    done = _few_steps(config, beside, steps, during=during)
    return float(statistics.median(row["tokens_per_s"] for row in done.log.rows[WARMUP:]))


def _few_steps(config: TrainConfig, beside: Path, steps: int, **more: Any) -> Trained:
    require_one_process()
    with tempfile.TemporaryDirectory(prefix="ktverify-") as directory:
        count = steps + WARMUP
        keys = {"logging_steps": 1, "save_steps": count + 1, "resume_from_checkpoint": None}
        short = config.model_copy(update={**keys, "output_dir": f"{directory}/out"})
        try:
            return run(short, beside, first_steps=count, **more)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # without run's hint, which names a directory that is deleted
        except NotFinite as error:
            raise NotFinite(f"stopped at {error.__cause__}") from None
