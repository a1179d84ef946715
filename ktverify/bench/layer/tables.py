"""The tables of `bench layer` and `bench sweep`, joined in a `View`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ktverify.bench.layer import pictures
from ktverify.bench.layer.record import SWEEPS, LayerLine, Line
from ktverify.bench.layer.summary import BACKWARD, BOTH, FORWARD, TITLES, WHATS, SpotSummary, of, summarise
from ktverify.bench.timed_run import busy, run_pairs
from ktverify.report.grid import Grid
from ktverify.report.numbers import NOTHING, STATISTICS, count, error, number, ratio, statistics_cells
from ktverify.report.pages import View, statistics_row
from ktverify.system.machine import format_bytes
from ktverify.system.timing import BUSY


def view(lines: Sequence[Line]) -> View | None:
    """None where no spot was measured."""
    head = next((line for line in lines if isinstance(line, LayerLine)), None)
    found = summarise(lines)
    if head is None or not found:
        return None
    notes = disturbed(found)
    sweeping = head.spots[0].varied in SWEEPS
    grids = _sweeps(found) if sweeping else _layer(found)
    grids[0] = replace(grids[0], notes=(*notes, *grids[0].notes))
    picture = pictures.sweeps(head.case, found) if sweeping else pictures.layer(head.case, found)
    facts = [("case", head.case), *run_pairs(head)]
    return View("sweep" if sweeping else "layer", verdict(found), facts, grids, rows(found), picture)


def disturbed(found: Sequence[SpotSummary]) -> list[str]:
    """A note that names the spots where other programs had so much of the processors that the times mean little."""
    bad = [one for one in found if one.others >= BUSY]
    where = f" at {', '.join(one.name for one in bad)}" if len(bad) < len(found) else ""
    return busy((one.others for one in bad), where)


def verdict(found: Sequence[SpotSummary]) -> str:
    """One line: the first spot's times, or how much each sweep's time grows."""
    first, last = found[0], found[-1]
    if first.spot.varied not in SWEEPS:
        texts = [f"{what} {number(first.ms[what].median)} ms" for what in (FORWARD, BOTH, BACKWARD)]
        return f"{', '.join(texts)}, {count(first.tokens_per_s(BOTH))} tokens/s"
    texts = []
    for varied in SWEEPS:
        group = of(found, varied)
        if len(group) > 1:
            first, last = group[0], group[-1]
            growth = last.ms[BOTH].median / first.ms[BOTH].median
            texts.append(f"{TITLES[varied]} {first.spot.value} to {last.spot.value}: {ratio(growth)} times the time")
    return "; ".join(texts) or f"{BOTH} {number(found[0].ms[BOTH].median)} ms"


def _layer(found: Sequence[SpotSummary]) -> list[Grid]:
    grids = [times_grid(found[0])]
    if len(of(found, "tp")) > 1:
        grids.append(tp_grid(of(found, "tp")))
    if of(found, "throughput"):
        grids.append(throughput_grid(of(found, "throughput")))
    return [*grids, memory_grid(found)]


def times_grid(one: SpotSummary) -> Grid:
    """A row for each of WHATS; tokens per second at the median."""
    lines = []
    for what, ms in one.ms.items():
        rate = count(one.tokens_per_s(what)) if what in (FORWARD, BOTH) else NOTHING
        lines.append((what, *statistics_cells(ms), rate))
    rel_l2 = ", ".join(f"{name} {error(value, 1)}" for name, value in one.found.rel_l2.items())
    repeats = f"{one.spot.warmup} warm-ups before {one.ms[FORWARD].count} repeats"
    notes = (
        f"{one.found.isa}, TP {one.spot.tp}, {one.found.workers} workers; {repeats}; the first forward, which packs "
        f"the weights, {number(one.found.first_ns / 1e6)} ms",
        f"rel_l2 against fp32: {rel_l2}",
    )
    return Grid("times", notes, ("", *STATISTICS, "tokens/s"), tuple(lines))


def tp_grid(group: Sequence[SpotSummary]) -> Grid:
    """A row for each degree, with its speed-up over the first."""
    lines, base = [], group[0]
    for one in group:
        cells = []
        for what in (FORWARD, BOTH):
            ms = one.ms[what].median
            cells += [number(ms), ratio(base.ms[what].median / ms)]
        lines.append((one.name, str(one.found.workers), *cells))
    over = f"x TP {base.spot.tp}"
    headings = ("degree", "workers", f"{FORWARD} ms", over, f"{BOTH} ms", over)
    return Grid("tensor parallelism", ("medians, each degree in a process of its own",), headings, tuple(lines))


def throughput_grid(group: Sequence[SpotSummary]) -> Grid:
    """A row for each batch and sequence length."""
    lines = []
    for one in group:
        cells = [
            cell for what in (FORWARD, BOTH) for cell in (number(one.ms[what].median), count(one.tokens_per_s(what)))
        ]
        lines.append((one.name, str(one.case.qlen), *cells))
    headings = ("batch x sequence", "tokens", f"{FORWARD} ms", "tokens/s", f"{BOTH} ms", "tokens/s")
    return Grid("throughput", ("at the median; each in a process of its own",), headings, tuple(lines))


def memory_grid(found: Sequence[SpotSummary]) -> Grid:
    """A row for each spot: growth of its process over the bf16 weights of the experts that tokens reach."""
    lines = []
    for one in found:
        memory = one.memory
        if memory is None:
            continue
        points = (memory.loaded, memory.packed, memory.first_step, memory.last_step)
        over = ratio(memory.last_step / one.found.weights)
        grown = format_bytes(memory.last_step - memory.first_step)
        lines.append((one.name, format_bytes(one.found.weights), *map(format_bytes, points), grown, over))
    steps = f"after {found[0].spot.steps} steps"
    headings = ("", "weights reached", "loaded", "first forward", "1 step", steps, "since 1 step", f"{steps} / reached")
    note = "resident memory beyond that of the process before it had inputs; a step is forward, backward, AdamW, update"
    return Grid("memory", (note,), headings, tuple(lines))


def _sweeps(found: Sequence[SpotSummary]) -> list[Grid]:
    grids = []
    for varied in SWEEPS:
        group = of(found, varied)
        if not group:
            continue
        lines = []
        for one in group:
            cells = [number(one.ms[what].median) for what in (FORWARD, BOTH, BACKWARD)]
            growth = ratio(one.ms[BOTH].median / group[0].ms[BOTH].median)
            work = ratio(one.found.flops / group[0].found.flops)
            rate = number(one.found.flops / one.ms[FORWARD].median / 1e6)
            tokens = count(one.tokens_per_s(BOTH))
            packed = format_bytes(one.memory.packed) if one.memory is not None else NOTHING
            lines.append((str(one.spot.value), *cells, tokens, rate, growth, work, packed))
        times = (f"{FORWARD} ms", f"{BOTH} ms", f"{BACKWARD} ms")
        headings = (TITLES[varied], *times, "tokens/s", "forward GFLOP/s", "growth", "of operations", "memory")
        grids.append(Grid(f"over {TITLES[varied]}", ("medians, each in a process of its own",), headings, tuple(lines)))
    return grids


def rows(found: Sequence[SpotSummary]) -> list[dict[str, object]]:
    """A row for each spot and what it timed: milliseconds."""
    return [
        {
            "varied": one.spot.varied,
            "value": one.spot.value,
            "case": one.spot.case,
            "isa": one.found.isa,
            "tp": one.spot.tp,
            "workers": one.found.workers,
            "what": what,
            "unit": "ms",
            "others": one.others,
            **statistics_row(one.ms[what]),
        }
        for one in found
        for what in WHATS
    ]
