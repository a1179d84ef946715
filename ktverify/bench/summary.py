"""Summarise a bench run, whole or cut short: medians, spread, ratios per round, distance from the roofline.

One `ShapeSummary` per shape and run. Pure arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ktverify.bench import record
from ktverify.bench.engines import OWN
from ktverify.bench.record import EngineLine, Line, RoundCeilingLine, ShapeLine, StagesLine, TurnLine
from ktverify.bench.shapes import Work
from ktverify.engines.native.phase_times import StageTimes
from ktverify.runs.record import VerdictName
from ktverify.system.timing import BUSY, Statistics

# a round of a group: (group, round)
Round = tuple[int, int]
L = TypeVar("L", TurnLine, RoundCeilingLine)

ENOUGH = 5  # the median is of undisturbed turns alone where there are at least so many


@dataclass(frozen=True)
class EngineTiming:
    """One engine's times of one kind of call. ms: milliseconds; against_own: its time over the native engine's, round
    by round; over_roofline: its time over the roofline time of the same round. None: there is nothing to divide by.
    """

    ms: Statistics
    against_own: Statistics | None
    over_roofline: Statistics | None


@dataclass(frozen=True)
class EngineSummary:
    """One engine at one shape. timings: of forward, forward_saving and backward, those that were measured."""

    line: EngineLine
    timings: dict[str, EngineTiming]
    backward_over_forward: Statistics | None

    def verdict(self, what: str) -> VerdictName:
        found: VerdictName = getattr(self.line, what)
        return found


@dataclass(frozen=True)
class Roofline:
    """The roofline time of one kind of call in milliseconds, and what bounds it: "memory" or "arithmetic"."""

    ms: Statistics
    bound: str


@dataclass(frozen=True)
class ShapeSummary:
    """One shape in one run. read: bytes per second; multiply: operations per second; others: the largest share of the
    processors that other programs had during a group of rounds; left_out: disturbed turns of all `turns`; rooflines: by
    forward, backward; stages: the native engine's recorded calls of median length, forward, then backward."""

    shape: ShapeLine
    run: int
    engines: tuple[EngineSummary, ...]
    read: Statistics | None
    multiply: Statistics | None
    isa: str
    rooflines: dict[str, Roofline]
    groups: int
    others: float
    turns: int
    left_out: int
    restless: tuple[str, ...]
    stages: tuple[StageTimes, ...]

    def engine(self, name: str) -> EngineSummary | None:
        return next((engine for engine in self.engines if engine.line.engine == name), None)


def spread(values: Iterable[float]) -> Statistics | None:
    """None without a value."""
    found = list(values)
    return Statistics.of(found) if found else None


def summarise(lines: Sequence[Line]) -> list[ShapeSummary]:
    """One summary per shape and run, in the order of measuring. A run without a full round has no times."""
    head = next((line for line in lines if isinstance(line, record.HeadLine)), None)
    order = {name: place for place, name in enumerate(head.engines)} if head is not None else {}
    measured, found = [line for line in lines if not isinstance(line, record.HeadLine | ShapeLine)], []
    for shape in (line for line in lines if isinstance(line, ShapeLine)):
        mine = [line for line in measured if line.shape == shape.shape]
        for run in sorted({line.run for line in mine}):
            found.append(_summary(shape, run, [line for line in mine if line.run == run], order))
    return found


def _summary(
    shape: ShapeLine,
    run: int,
    lines: list[EngineLine | TurnLine | RoundCeilingLine | record.GroupOtherLoadLine | StagesLine],
    order: dict[str, int],
) -> ShapeSummary:
    every: dict[tuple[str, str], dict[Round, TurnLine]] = defaultdict(dict)
    for line in lines:
        if isinstance(line, TurnLine):
            every[line.engine, line.what][line.group, line.round] = line
    kept = {series: _undisturbed(turns) for series, turns in every.items()}
    times: dict[tuple[str, str], dict[Round, float]] = defaultdict(
        dict, {series: {at: line.ns / 1e6 for at, line in turns.items()} for series, turns in kept.items()}
    )
    ceilings = _undisturbed({(line.group, line.round): line for line in lines if isinstance(line, RoundCeilingLine)})
    forward = Work(shape.forward_bytes, shape.forward_flops)
    backward = Work(shape.backward_bytes, shape.backward_flops)

    def rooflines(work: Work) -> dict[Round, float]:
        return {at: 1e3 * work.seconds(line.read, line.multiply) for at, line in ceilings.items()}

    bounds = {"forward": rooflines(forward), "forward_saving": rooflines(forward), "backward": rooflines(backward)}
    states = _states(lines)

    def timing(engine: str, what: str) -> EngineTiming | None:
        at = times[engine, what]
        ms = spread(at.values())
        state = states[engine]
        if ms is None or state.forward != "PASS" or (what != "forward" and state.backward != "PASS"):
            return None
        own = times[OWN, what] if OWN in states and states[OWN].forward == "PASS" else {}
        return EngineTiming(ms, _ratio(at, own), _ratio(at, bounds[what]))

    summaries = []
    for name in sorted(states, key=lambda name: order.get(name, len(order))):
        timings = {what: found for what in bounds if (found := timing(name, what)) is not None}
        both = {"forward", "backward"} <= timings.keys()
        over = _ratio(times[name, "backward"], times[name, "forward"]) if both else None
        summaries.append(EngineSummary(states[name], timings, over))
    quiet = [line for line in lines if isinstance(line, record.GroupOtherLoadLine)]
    return ShapeSummary(
        shape=shape,
        run=run,
        engines=tuple(summaries),
        read=spread(line.read for line in ceilings.values()),
        multiply=spread(line.multiply for line in ceilings.values()),
        isa=next((line.isa for line in ceilings.values()), ""),
        rooflines={
            what: roofline
            for what, work in (("forward", forward), ("backward", backward))
            if (roofline := _roofline(work, ceilings, bounds[what])) is not None
        },
        groups=len({line.group for line in lines if isinstance(line, TurnLine)}),
        others=max((line.others for line in quiet), default=0.0),
        turns=sum(map(len, every.values())),
        left_out=sum(map(len, every.values())) - sum(map(len, kept.values())),
        restless=tuple(sorted({name for line in quiet for name in line.restless})),
        stages=_typical([line.times for line in lines if isinstance(line, StagesLine)]),
    )


def _typical(recorded: Sequence[StageTimes]) -> tuple[StageTimes, ...]:
    """The call of median length for each direction: medians of single phases would not add up."""
    found = []
    for direction in ("forward", "backward"):
        calls = sorted((t for t in recorded if t.direction == direction), key=lambda times: times.wall_ns)
        found += calls[len(calls) // 2 :][:1]
    return tuple(found)


def _undisturbed(turns: dict[Round, L]) -> dict[Round, L]:
    """The turns during which other programs left the processors alone; all turns where those are too few."""
    quiet = {at: line for at, line in turns.items() if line.others < BUSY}
    return quiet if len(quiet) >= max(ENOUGH, len(turns) / 3) else turns


def _states(lines: Sequence[Line]) -> dict[str, EngineLine]:
    """The last line of each engine; for an engine that was in several groups, the line of one that did not pass."""
    latest: dict[tuple[str, int], EngineLine] = {}
    for line in lines:
        if isinstance(line, EngineLine):
            latest[line.engine, line.group] = line
    found: dict[str, EngineLine] = {}
    for (name, _), line in sorted(latest.items(), key=lambda item: item[0]):
        before = found.get(name)
        passed = line.forward == "PASS" and line.backward in ("PASS", "UNSUPPORTED")
        if before is None or not passed:
            found[name] = line
    return found


def _ratio(upper: dict[Round, float], lower: dict[Round, float]) -> Statistics | None:
    """The spread of upper / lower over the rounds that both have."""
    return spread(upper[at] / lower[at] for at in upper if lower.get(at, 0) > 0)


def _roofline(work: Work, ceilings: dict[Round, RoundCeilingLine], times: dict[Round, float]) -> Roofline | None:
    ms = spread(times.values())
    if ms is None:
        return None
    by_memory = sum(work.bound(line.read, line.multiply) == "memory" for line in ceilings.values())
    return Roofline(ms, "memory" if 2 * by_memory >= len(ceilings) else "arithmetic")
