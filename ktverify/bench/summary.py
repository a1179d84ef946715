"""Summarise a bench run, whole or cut short: minima and their spread, ratios of minima, distance from the roofline.

One `ShapeSummary` per shape and run. Pure arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ktverify.bench import record
from ktverify.bench.engines import OWN
from ktverify.bench.record import EngineLine, Line, RoundCeilingLine, ShapeLine, StagesLine, TurnLine
from ktverify.engines.native.phase_times import StageTimes
from ktverify.runs.record import VerdictName
from ktverify.system.plausible import Ceilings, Work
from ktverify.system.timing import BUSY, Ratio, Statistics

# a round of a group: (group, round)
Round = tuple[int, int]
L = TypeVar("L", TurnLine, RoundCeilingLine)

ENOUGH = 5  # the times are those of undisturbed turns alone where there are at least so many


@dataclass(frozen=True)
class EngineTiming:
    """One engine's times of one kind of call. ms: milliseconds; against_own: its minimum over the native engine's;
    over_roofline: its minimum over the smallest roofline time of the same rounds. None: there is nothing to divide by.
    """

    ms: Statistics
    against_own: Ratio | None
    over_roofline: Ratio | None


@dataclass(frozen=True)
class EngineSummary:
    """One engine at one shape. timings: of forward, forward_saving and backward, those that were measured."""

    line: EngineLine
    timings: dict[str, EngineTiming]
    backward_over_forward: Ratio | None

    def verdict(self, what: str) -> VerdictName:
        found: VerdictName = getattr(self.line, what)
        return found


@dataclass(frozen=True)
class Roofline:
    """The roofline time of one kind of call in milliseconds, and what bounds its minimum: "memory" or "arithmetic"."""

    ms: Statistics
    bound: str


@dataclass(frozen=True)
class ShapeSummary:
    """One shape in one run. read: bytes per second; multiply: operations per second; others: the largest share of the
    processors that other programs had during a group of rounds; left_out: disturbed turns of all `turns`; rooflines: by
    forward, backward; stages: the native engine's shortest recorded calls, forward, then backward."""

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
            found.append(_summary(shape, run, [line for line in mine if line.run == run], order, head))
    return found


def _summary(
    shape: ShapeLine,
    run: int,
    lines: list[EngineLine | TurnLine | RoundCeilingLine | record.GroupOtherLoadLine | StagesLine],
    order: dict[str, int],
    head: record.HeadLine | None,
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

    def rooflines(bits: int) -> dict[str, dict[Round, float]]:
        """By kind of call, for base weights of so many bits."""
        return {
            what: {
                at: 1e3 * Work(work.bytes * bits / 16, work.flops).seconds(line.read, line.multiply)
                for at, line in ceilings.items()
            }
            for what, work in (("forward", forward), ("forward_saving", forward), ("backward", backward))
        }

    bounds = rooflines(16)
    machine = _machine(ceilings.values(), head)
    states = {
        name: _doubted(line, {what: spread(times[name, what].values()) for what in bounds}, machine, forward, backward)
        for name, line in _states(lines).items()
    }

    def timing(engine: str, what: str) -> EngineTiming | None:
        at = times[engine, what]
        ms = spread(at.values())
        state = states[engine]
        if ms is None or state.forward != "PASS" or (what != "forward" and state.backward != "PASS"):
            return None
        own = times[OWN, what] if OWN in states and states[OWN].forward == "PASS" else {}
        return EngineTiming(ms, _ratio(at, own), _ratio(at, rooflines(state.bits)[what]))

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
        stages=_shortest([line.times for line in lines if isinstance(line, StagesLine)]),
    )


def _machine(ceilings: Collection[RoundCeilingLine], head: record.HeadLine | None) -> Ceilings | None:
    """The best that was measured in the rounds; None for a run that says too little."""
    if not ceilings or head is None or head.cache_bytes is None:
        return None
    read, multiply = max(line.read for line in ceilings), max(line.multiply for line in ceilings)
    return Ceilings(read, multiply, next(iter(ceilings)).isa, head.cache_bytes, head.machine.flags)


def _doubted(
    line: EngineLine, times: dict[str, Statistics | None], machine: Ceilings | None, forward: Work, backward: Work
) -> EngineLine:
    """The line with MISTRUSTED in place of PASS for a direction that took less time than the machine needs."""
    for what, ms in times.items():
        work, direction = (backward, what) if what == "backward" else (forward, "forward")
        # codes of fewer bits are multiplied faster as well
        fewer = Work(work.bytes * line.bits / 16, work.flops * line.bits / 16)
        if machine is None or ms is None or getattr(line, direction) != "PASS":
            continue
        if doubt := machine.too_fast(ms.min, fewer):
            line = line.model_copy(update={direction: "MISTRUSTED", "reason": f"{what}: {doubt}"})
    return line


def _shortest(recorded: Sequence[StageTimes]) -> tuple[StageTimes, ...]:
    """The shortest call of each direction: minima of single phases would not add up."""
    found = []
    for direction in ("forward", "backward"):
        calls = [times for times in recorded if times.direction == direction]
        found += sorted(calls, key=lambda times: times.wall_ns)[:1]
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


def _ratio(upper: dict[Round, float], lower: dict[Round, float]) -> Ratio | None:
    """The minimum of `upper` over that of `lower` in the same groups; None without a time in both."""
    groups = {group for group, _ in upper}
    beside = [value for (group, _), value in lower.items() if group in groups]
    over, under = spread(upper.values()), spread(beside)
    return Ratio.of(over, under) if over is not None and under is not None else None


def _roofline(work: Work, ceilings: dict[Round, RoundCeilingLine], times: dict[Round, float]) -> Roofline | None:
    ms = spread(times.values())
    if ms is None:
        return None
    best = ceilings[min(times, key=times.__getitem__)]
    return Roofline(ms, work.bound(best.read, best.multiply))
