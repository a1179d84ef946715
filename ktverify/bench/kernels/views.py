"""A run of `bench kernels`: for each tunable, today's choice against the alternatives, in a `View`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktverify.bench.kernels.record import KernelsLine, Line, OtherBitsLine, TimeLine, TunableCeilingLine, TunableLine
from ktverify.bench.timed_run import disturbed, run_pairs
from ktverify.report.grid import Grid
from ktverify.report.numbers import LOWEST, NOTHING, compared, lowest_cells, many, number, percent, ratio
from ktverify.report.pages import View, statistics_row
from ktverify.system.timing import Ratio, Statistics

# a smaller gain is no reason to change a constant
GAIN = 0.05


@dataclass(frozen=True)
class TunableSummary:
    """One tunable at one number of rows. ms: of each value that was timed, today's first; read, multiply: the best of
    the same rounds, per second."""

    spot: TunableLine
    ms: dict[str, Statistics]
    read: float
    multiply: float
    other_bits: tuple[str, ...]

    def against_today(self, value: str) -> Ratio:
        return Ratio.of(self.ms[value], self.ms[self.spot.today])

    @property
    def better(self) -> str | None:
        """The value that is faster than today's by more than GAIN, the fastest of several; None where there is none."""
        fastest = min(self.ms, key=lambda value: self.ms[value].min)
        over = self.against_today(fastest)
        return fastest if over.clear and over.value < 1 / (1 + GAIN) else None

    @property
    def roofline_ms(self) -> float:
        return 1e3 * max(self.spot.bytes / self.read, self.spot.flops / self.multiply)


def summarise(lines: Sequence[Line]) -> list[TunableSummary]:
    """One for each spot with a whole round, in order."""
    found = []
    for spot in (line for line in lines if isinstance(line, TunableLine)):
        times = [line for line in lines if isinstance(line, TimeLine) and line.number == spot.number]
        ceilings = [line for line in lines if isinstance(line, TunableCeilingLine) and line.number == spot.number]
        other = tuple(x.value for x in lines if isinstance(x, OtherBitsLine) and x.number == spot.number)
        if not ceilings:
            continue
        values = dict.fromkeys(line.value for line in times)
        ms = {value: Statistics.of([line.ns / 1e6 for line in times if line.value == value]) for value in values}
        read, multiply = max(line.read for line in ceilings), max(line.multiply for line in ceilings)
        found.append(TunableSummary(spot, ms, read, multiply, other))
    return found


def view(lines: Sequence[Line]) -> View | None:
    """None where no spot was measured."""
    found = summarise(lines)
    head = next((line for line in lines if isinstance(line, KernelsLine)), None)
    if head is None or not found:
        return None
    sizes = f"{head.isa}, {many(head.threads, 'thread')}, W {head.n} x {head.k}"
    facts = [("kernels", sizes), *run_pairs(head)]
    return View("kernels", verdict(found), facts, [grid(one) for one in found], rows(found), None, disturbed(lines))


def verdict(found: Sequence[TunableSummary]) -> str:
    """One line: where another value is better by more than GAIN."""
    nothing = f"no other value is better than today's by more than {percent(GAIN, 0)}"
    better = [
        f"{one.spot.tunable}, {many(one.spot.rows, 'row')}: {one.better} instead of {one.spot.today} takes "
        f"{ratio(one.against_today(one.better).value)} of the time"
        for one in found
        if one.better is not None
    ]
    return f"{'; '.join(better) or nothing} (minima)"


def grid(one: TunableSummary) -> Grid:
    """A row for each value: times, rates beside the ceilings of the same rounds, and the time over today's."""
    lines = []
    for value, ms in one.ms.items():
        read, multiply = (amount / (ms.min / 1e3) for amount in (one.spot.bytes, one.spot.flops))
        today = value == one.spot.today
        rates = (
            number(read / 1e9),
            percent(read / one.read, 0),
            number(multiply / 1e9),
            percent(multiply / one.multiply, 0),
        )
        over = NOTHING if today else compared(one.against_today(value))
        name = f"{value} (today)" if today else f"{value} (better)" if value == one.better else value
        lines.append((name, *lowest_cells(ms), *rates, ratio(ms.min / one.roofline_ms), over))
    ceilings = f"ceilings: reading {number(one.read / 1e9)} GB/s, multiplying {number(one.multiply / 1e9)} GFLOP/s"
    notes = [f"{one.ms[one.spot.today].count} rounds; {ceilings}, the best of these rounds"]
    notes += [f"FAIL {value}: it computes other bits than today's choice" for value in one.other_bits]
    title = f"{one.spot.tunable}: {one.spot.product}, {many(one.spot.rows, 'row')}"
    headings = ("value", *LOWEST, "GB/s", "of reading", "GFLOP/s", "of peak", "x roofline", "x today")
    return Grid(title, tuple(notes), headings, tuple(lines))


def rows(found: Sequence[TunableSummary]) -> list[dict[str, object]]:
    """A row for each value of each spot: milliseconds."""
    return [
        {
            **{name: getattr(one.spot, name) for name in ("tunable", "product", "rows", "today")},
            "value": value,
            "unit": "ms",
            **statistics_row(ms),
            "x_today": one.against_today(value).value,
            "spread": one.against_today(value).spread,
            "roofline": one.roofline_ms,
        }
        for one in found
        for value, ms in one.ms.items()
    ]
