"""Loss histories: read from loss.jsonl or trainer_state.json, fit, compare, draw. Light: imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktverify.errors import one_line
from ktverify.runs.jsonl import read_objects
from ktverify.system.text import json_rows, read_text

LOSS_FILE, STATE_FILE = "loss.jsonl", "trainer_state.json"
# the most that two runs of the same mathematics in different precision differ; beyond it they are different trainings
MAX_RELATIVE = 0.05


@dataclass(frozen=True)
class Curve:
    """Losses (nats per token, mean over the logged steps) by step, ascending; NaN where a line has none. problem: the
    first line without a number, or with NaN or Inf, as loss or grad_norm; "" where all are finite."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    problem: str = ""

    @property
    def slope(self) -> float:
        """Nats per step of the least-squares line through all points; nan with fewer than two."""
        return slope(self.steps, self.losses)


@dataclass(frozen=True)
class Comparison:
    """|new - old| / |old| over the common steps; final: at the last of them."""

    steps: tuple[int, ...]
    mean: float
    largest: float
    largest_at: int
    final: float
    slopes: tuple[float, float]

    @property
    def passed(self) -> bool:
        return self.largest <= MAX_RELATIVE


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of ys over xs; nan where it has none."""
    count = len(xs)
    if count < 2:
        return math.nan
    centre, middle = sum(xs) / count, sum(ys) / count
    spread = sum((x - centre) ** 2 for x in xs)
    return sum((x - centre) * (y - middle) for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan


def read_curve(path: Path) -> Curve:
    """The loss history at `path`: a run's directory, JSON lines, or a trainer_state.json. ValueError without one."""
    file = path
    if path.is_dir():
        file = next((path / name for name in (LOSS_FILE, STATE_FILE) if (path / name).is_file()), path)
    if not file.is_file():
        raise ValueError(f"{path} has no loss history: it takes {LOSS_FILE}, {STATE_FILE}, or a directory with one")
    try:
        rows: list[Any]
        try:
            rows = [_object(row, where) for where, row in json_rows(read_text(file), str(file))]
        except ValueError:
            if file.suffix != ".jsonl":
                raise
            rows = list(read_objects(file))  # names a last line that was cut off, and leaves it out
        if len(rows) == 1 and isinstance(rows[0], dict) and "log_history" in rows[0]:
            # the Trainer's has lines of other kinds
            rows = [row for row in rows[0]["log_history"] if "loss" in row]
        found = curve_of(rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no loss history: {one_line(error)}") from None
    if not found.steps:
        raise ValueError(f"{file} has no losses")
    return found


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} cannot be read: it is a {type(row).__name__}, not an object")
    return row


def curve_of(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """The curve of lines with step, loss and perhaps grad_norm; of several lines of one step the last one counts."""
    by_step = {int(row["step"]): row for row in rows}
    steps = tuple(sorted(by_step))
    losses = tuple(math.nan if by_step[step].get("loss") is None else float(by_step[step]["loss"]) for step in steps)
    return Curve(steps, losses, next((found for step in steps if (found := _problem(by_step[step]))), ""))


def _problem(row: Mapping[str, Any]) -> str:
    """What is wrong with a line of a history; "" for nothing. grad_norm may be left out, but not be null."""
    for name, absent in (("loss", None), ("grad_norm", 0.0)):
        value = row.get(name, absent)
        if value is None:
            return f"step {row['step']} has no {name}"
        if not math.isfinite(float(value)):
            return f"step {row['step']} has {name} {to_text(float(value))}"
    return ""


def to_text(value: float, digits: str = ".4f") -> str:
    """A number as a reader sees it, also NaN and Inf."""
    return f"{value:{digits}}".replace("nan", "NaN").replace("inf", "Inf")


def compare(old: Curve, new: Curve) -> Comparison:
    """The distance of `new` from `old`. ValueError for histories with different steps, or with NaN or Inf."""
    if old.steps != new.steps:
        differ = sorted(set(old.steps) ^ set(new.steps))
        raise ValueError(f"the histories have other steps: {len(differ)} are in one only, first {differ[0]}")
    for curve in (old, new):
        points = zip(curve.steps, curve.losses, strict=True)
        broken = next(
            (f"the loss of step {step} is not finite" for step, loss in points if not math.isfinite(loss)), ""
        )
        if problem := curve.problem or broken:
            raise ValueError(problem)
    apart = [abs(n - o) / max(abs(o), 1e-12) for o, n in zip(old.losses, new.losses, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    return Comparison(
        old.steps, sum(apart) / len(apart), apart[worst], old.steps[worst], apart[-1], (old.slope, new.slope)
    )


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Write a PNG of the curves by name: loss over step, with the last loss in the legend."""
    from matplotlib.figure import Figure

    from ktverify.report.style import BLUE, ORANGE, PURPLE, bare, png
    from ktverify.system.files import write_whole

    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    colours = (PURPLE, ORANGE, BLUE)
    bare(axes, grid="y")
    for place, (name, curve) in enumerate(curves.items()):
        style = "-" if place == 0 else (0, (4, 2))
        label = f"{name}, last {curve.losses[-1]:.3f}"
        axes.plot(curve.steps, curve.losses, color=colours[place % 3], linewidth=1.6, linestyle=style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    write_whole(path, png(figure))
