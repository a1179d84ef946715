"""The commands memory and throughput: a few steps of a training, in a temporary directory."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ktverify.training.config import TrainConfig
from ktverify.training.curves import slope
from ktverify.training.run import Trained, run

# what allocators add per step until their size has settled; a leak of one token's activations is more
LEAK_BYTES = 1 << 18
WARMUP = 3  # steps that do not count: pages are touched and experts packed in them


@dataclass(frozen=True)
class Memory:
    """Resident bytes after loading and after each step; slope: growth() of the steps after the warm-up; waiting: saved
    forwards that wait for a backward in the engines at the end."""

    loaded: int
    steps: tuple[int, ...]
    slope: float
    waiting: int = 0

    @property
    def leaks(self) -> bool:
        return self.slope > LEAK_BYTES or self.waiting > 0


def measure_memory(config: TrainConfig, beside: Path, steps: int = 10) -> Memory:
    """Train for `steps` steps after WARMUP and measure the resident memory after each."""
    done = _few_steps(config, beside, steps, one_length=True)
    rss = done.log.rss[WARMUP:]
    waiting = sum(w.engine.saved_forwards for w in getattr(done.model, "_kt_wrappers", ()) if w.engine)
    return Memory(done.log.rss_before, tuple(rss), growth(rss), waiting)


def growth(rss: Sequence[int]) -> float:
    """Bytes per step, fitted, without the largest single rise: an allocator may take more once, a leak repeats it."""
    rises = [after - before for before, after in itertools.pairwise(rss)]
    largest = max(range(len(rises)), key=rises.__getitem__, default=0)
    spared = max(0, rises[largest]) if len(rises) > 1 else 0
    return slope(range(len(rss)), [r - spared if at > largest else r for at, r in enumerate(rss)])


def measure_throughput(config: TrainConfig, beside: Path, steps: int = 10) -> float:
    """Tokens per second, padding left out, over `steps` steps after WARMUP: the median step's."""
    done = _few_steps(config, beside, steps)
    return float(statistics.median(row["tokens_per_s"] for row in done.log.rows[WARMUP:]))


def _few_steps(config: TrainConfig, beside: Path, steps: int, *, one_length: bool = False) -> Trained:
    with tempfile.TemporaryDirectory(prefix="ktverify-") as directory:
        short = config.model_copy(
            update={
                "output_dir": f"{directory}/out",
                "max_steps": steps + WARMUP,
                "logging_steps": 1,
                "save_steps": steps + WARMUP + 1,
                "resume_from_checkpoint": None,
            }
        )
        try:
            return run(short, beside, one_length=one_length)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # without run's hint, which names a directory that is deleted
