"""What transformers' Trainer calls during a training: the loss log, and the removal of old checkpoints."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from ktverify.runs.jsonl import append_line, read_objects
from ktverify.system.files import write_whole
from ktverify.training import curves, output_directory


class LossLog(TrainerCallback):  # type: ignore[misc]
    """A callback of transformers' Trainer that writes loss.jsonl in `directory`, one line for each logged step.

    rows: the lines; a resumed run removes those after its checkpoint's step. rss: resident bytes after every step,
    rss_before: before the first; begun: the step and the tokens that a resumed run starts from.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / curves.LOSS_FILE
        self.rows: list[dict[str, Any]] = []
        self.rss: list[int] = []
        self.rss_before = 0
        self._process = psutil.Process()
        self.begun = (0, 0)
        self._since = (0.0, 0)

    @property
    def curve(self) -> curves.Curve:
        return curves.Curve(tuple(row["step"] for row in self.rows), tuple(row["loss"] for row in self.rows))

    def read(self, step: int) -> None:
        """Take the rows up to `step` from the file, where there is one."""
        rows = read_objects(self.path) if self.path.is_file() else []
        self.rows = [row for row in rows if row["step"] <= step]

    def write(self) -> None:
        """Leave these rows alone in the file."""
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.read(state.global_step)
        self.write()
        self.rss_before = self._process.memory_info().rss
        self.begun = (int(state.global_step), int(state.num_input_tokens_seen))
        self._since = (time.perf_counter(), self.begun[1])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # so that a run shorter than logging_steps also has a loss
            control.should_log = True
        self.rss.append(self._process.memory_info().rss)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        seconds = now - self._since[0]
        row = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            "tokens": tokens,
            "tokens_per_s": round((tokens - self._since[1]) / seconds, 1) if seconds > 0 else None,
            "rss": self._process.memory_info().rss,
        }
        self._since = (now, tokens)
        self.rows.append(row)
        if not sys.stderr.isatty():  # a terminal shows the Trainer's progress bar
            speed = f"{row['tokens_per_s']} tokens/s"
            print(f"step {row['step']}/{state.max_steps}  loss {row['loss']:.4f}  {speed}", file=sys.stderr)
        append_line(self.path, json.dumps(row))


class Rotation(TrainerCallback):  # type: ignore[misc]
    """A callback of transformers' Trainer that keeps the `limit` newest checkpoints in `directory`; None keeps all."""

    def __init__(self, directory: Path, limit: int | None) -> None:
        self.directory, self.limit = directory, limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        output_directory.remove_old_checkpoints(self.directory, self.limit)
