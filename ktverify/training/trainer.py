"""transformers' Trainer with a loss of our own: exact over checkpoints, and a stop at NaN; and what it calls.

The Trainer's own mean begins anew at a checkpoint, and it leaves NaN and Inf out of it.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ktverify.errors import NotFinite
from ktverify.isolation.regions import trim
from ktverify.runs.jsonl import append_line, read_objects, to_json, with_named_floats
from ktverify.system.files import write_whole
from ktverify.training import curves, output_directory
from ktverify.training.ranks import Divided, rows_of


@dataclass
class RunningLoss:
    """The sum of the losses of all steps after step `since`, the last one that was logged on schedule."""

    since: int = 0
    total: float = 0.0


class LossTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that logs the mean of `log.running`, and raises NotFinite, before the optimizer's step, where the loss
    or the norm of all gradients is NaN or Inf. stop_on_nan: False goes on, and logs it.

    divided: of a model whose experts are divided among processes. This one computes its rows of each batch; losses,
    norms and dense gradients are those of all rows. max_grad_norm: clips them; the Trainer's own arguments clip nothing
    then. seed: of the dropout of this process, None without dropout."""

    def __init__(
        self,
        *,
        log: LossLog,
        stop_on_nan: bool,
        divided: Divided | None = None,
        max_grad_norm: float = 0.0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self.loss_log, self.stop_on_nan, self.grad_norm = log, stop_on_nan, 0.0
        self._step_loss = 0.0  # of the micro-batches of this step so far
        self.divided, self._most, self._seed = divided, max_grad_norm, seed
        self._batches = 0  # of this step
        super().__init__(**options)
        if divided is not None and not self.model_accepts_loss_kwargs:
            raise ValueError(
                "kt_ep: true takes a model whose forward takes num_items_in_batch, by which the loss of its rows is a "
                "part of the batch's"
            )

    def create_optimizer(self, *given: Any) -> Any:
        optimizer = super().create_optimizer(*given)
        if self.divided is not None:
            self.divided.attach(optimizer)
        return optimizer

    def _save_checkpoint(self, *given: Any, **named: Any) -> None:
        """Rank 0 writes; the others give it what they have, in the same order."""
        if self.divided is None or self.divided.ranks.rank == 0:
            super()._save_checkpoint(*given, **named)
        else:
            self.model.save_pretrained("")
            self.optimizer.state_dict()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        ranks = None if self.divided is None else self.divided.ranks
        if ranks is not None:
            inputs = rows_of(inputs, ranks)
            if self._seed is not None:
                # by step, so that a resumed training has the same, and by rank: its rows are others
                self._batches += 1
                name = f"{self._seed} {self.state.global_step} {self._batches} {ranks.rank}"
                torch.manual_seed(random.Random(name).getrandbits(63))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if ranks is not None:
            loss = ranks.add(loss)
        running = self.loss_log.running
        running.total += loss.item()
        self._step_loss += loss.item()
        if self.accelerator.sync_gradients:
            step_loss, self._step_loss = self._step_loss, 0.0
            self._batches = 0
            self.grad_norm = _norm_of_gradients(model) if self.divided is None else self.divided.reduce(self._most)
            # of this step alone: the running sum may have the NaN of an earlier one, after which it went on
            if self.stop_on_nan and not math.isfinite(step_loss + self.grad_norm):
                step = self.state.global_step + 1
                rate = self.optimizer.param_groups[0]["lr"]
                values = {"loss": self._mean(step), "learning_rate": rate, "grad_norm": self.grad_norm}
                self.loss_log.add(step, values, self.state)
                shown = (curves.to_text(values[name]) for name in ("loss", "grad_norm"))
                raise NotFinite(f"step {step}: loss {next(shown)}, grad_norm {next(shown)}")
        return loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log, with the mean loss since the last line; NaN and Inf as texts, which trainer_state.json can hold."""
        step, running = self.state.global_step, self.loss_log.running
        if "loss" in logs:
            logs |= {"loss": self._mean(step), "grad_norm": self.grad_norm}
            # a line at the end of a training is no part of the schedule: a longer training does not have it
            if step % self.state.logging_steps == 0:
                running.since, running.total = step, 0.0
        super().log(with_named_floats(logs), start_time)

    def _mean(self, step: int) -> float:
        return self.loss_log.running.total / (step - self.loss_log.running.since)


def _norm_of_gradients(model: torch.nn.Module) -> float:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(found).item()


# whether a training of first steps may end: from the resident bytes after every step
Enough = Callable[[Sequence[int]], bool]


class LossLog(TrainerCallback, ExportableState):  # type: ignore[misc]
    """A callback of transformers' Trainer that writes loss.jsonl in `directory`, one line for each logged step.

    kept: what every checkpoint keeps, beside `running`, in its trainer_state.json. rows: the lines; a resumed run
    removes those after its checkpoint's step. rss: resident bytes after every step, rss_before: before the first;
    begun: the step and the tokens that a resumed run starts from. last: the step to end after, None for all,
    or a later one, when `enough` is true of rss; with `enough`, these are the bytes in use, which take longer to count.
    """

    def __init__(
        self,
        directory: Path,
        kept: Mapping[str, Any] | None = None,
        last: int | None = None,
        enough: Enough | None = None,
    ) -> None:
        self.last, self.enough = last, enough
        self.path = directory / curves.LOSS_FILE
        self.kept = dict(kept or {})
        self.running = RunningLoss()
        self.rows: list[dict[str, Any]] = []
        self.rss: list[int] = []
        self.rss_before = 0
        self._process = psutil.Process()
        self._bytes = self._resident if enough is None else self._used
        self.begun = (0, 0)
        self._since = (0.0, 0)

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _used(self) -> int:
        """Resident bytes without what malloc only holds: a small block that is kept may come from there."""
        trim()
        return self._resident()

    @property
    def curve(self) -> curves.Curve:
        return curves.curve_of(self.rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `output_directory.kept_in` reads it."""
        running = with_named_floats({"since": self.running.since, "total": self.running.total})
        return {"args": {}, "attributes": {**self.kept, "running": running}}

    def read(self, step: int) -> None:
        """Take the rows up to `step` from the file, where there is one."""
        rows = read_objects(self.path) if self.path.is_file() else []
        self.rows = [row for row in rows if row["step"] <= step]

    def write(self) -> None:
        """Leave these rows alone in the file."""
        write_whole(self.path, "".join(to_json(row) + "\n" for row in self.rows))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            kept = state.stateful_callbacks[type(self).__name__]["attributes"]["running"]
            self.running = RunningLoss(int(kept["since"]), float(kept["total"]))
        # the state has those of the checkpoint
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        # a line behind the last one on schedule was the last of a shorter training
        since = self.running.since
        state.log_history = [row for row in state.log_history if "loss" in row and row["step"] <= since]
        self.read(since)
        self.write()
        self.rss_before = self._bytes()
        self.begun = (int(state.global_step), int(state.num_input_tokens_seen))
        self._since = (time.perf_counter(), self.begun[1])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rss.append(self._bytes())
        step = state.global_step
        enough = self.last is not None and step >= self.last and (self.enough is None or self.enough(self.rss))
        if enough or step >= state.max_steps:
            # so that a run shorter than logging_steps also has a loss
            control.should_log = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.add(state.global_step, logs, state)

    def add(self, step: int, values: Mapping[str, Any], state: Any) -> None:
        """Write the line of a step: its loss, learning_rate and grad_norm."""
        now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        seconds = now - self._since[0]
        row: dict[str, Any] = {
            "step": step,
            **{name: float(values[name]) for name in ("loss", "learning_rate", "grad_norm")},
            "tokens": tokens,
            # a step that is stopped is not counted yet
            "tokens_per_s": round((tokens - self._since[1]) / seconds, 1) if tokens > self._since[1] else None,
            "rss": self._resident(),
        }
        self._since = (now, tokens)
        self.rows.append(row)
        if not sys.stderr.isatty():  # a terminal shows the Trainer's progress bar
            speed = "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']} tokens/s"
            print(f"step {step}/{state.max_steps}  loss {curves.to_text(row['loss'])}  {speed}", file=sys.stderr)
        append_line(self.path, to_json(row))


class FiniteParameters(TrainerCallback):  # type: ignore[misc]
    """A callback of transformers' Trainer that raises NotFinite where a step left NaN or Inf in a trained parameter,
    before anything is saved: no loss shows it after the last step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad and parameter.numel():
                ends = parameter.detach().aminmax()
                if not all(math.isfinite(end.item()) for end in ends):
                    raise NotFinite(f"step {state.global_step}: {name} has NaN or Inf after the optimizer's step")


class Rotation(TrainerCallback):  # type: ignore[misc]
    """A callback of transformers' Trainer that keeps the `limit` newest checkpoints in `directory`; None keeps all."""

    def __init__(self, directory: Path, limit: int | None) -> None:
        self.directory, self.limit = directory, limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        output_directory.remove_old_checkpoints(self.directory, self.limit)
