"""loss.jsonl: one line for each logged step of a training.

A line has step, loss, learning_rate, grad_norm, tokens, tokens_per_s and rss (bytes). A resumed run removes the lines
after its checkpoint's step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from ktverify.runs.jsonl import append_line, whole_lines
from ktverify.system.files import write_whole
from ktverify.training.curves import LOSS_FILE


class LossLog(TrainerCallback):  # type: ignore[misc]
    """A callback of transformers' Trainer that writes loss.jsonl in `directory`.

    rows: the lines; rss: resident bytes after every step, rss_before: before the first; begun: the step and the tokens
    that a resumed run starts from.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOSS_FILE
        self.rows: list[dict[str, Any]] = []
        self.rss: list[int] = []
        self.rss_before = 0
        self._process = psutil.Process()
        self.begun = (0, 0)
        self._since = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.is_file():
            rows = [json.loads(line) for line in whole_lines(self.path)]
            self.rows = [row for row in rows if row["step"] <= state.global_step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
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
