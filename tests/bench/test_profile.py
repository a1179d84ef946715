"""The profile of the layer: exact tables of made-up calls, and all parts of measured ones. No time is judged."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ktverify.bench.layer import profile, profile_record, profile_views
from ktverify.bench.layer.profile_record import RANGES, CallLine, CallPart, Pass, ProfileLine
from ktverify.bench.layer.profile_views import Imbalance, ProfileSummary, Worker, imbalances, stage_name, worker_of
from ktverify.bench.timed_run import CeilingLine, OtherLoadLine
from ktverify.engines.native.phase_times import Phase, Span, StageTimes
from ktverify.report import pages
from ktverify.spec.cases import Case
from ktverify.system import timing
from ktverify.system.timing import PERCENTILES, Clock, Statistics
from tests.support.command_line import TINY, call, ends, refused
from tests.support.records import HEAD
from tests.support.traces import nested, read_trace

TP2 = TINY.replace("I=32", "I=64")
MS = 1_000_000


def made_up(wall: int) -> StageTimes:
    """Two workers, two stages in 10 ms: one works 6 and 2 ms, the other comes 1 ms late and works 3 and 3 ms."""
    phases = (Phase("gate_up", (6 * MS, 3 * MS), 9e6, 0.0), Phase("down", (2 * MS, 3 * MS), 0.0, 4e6))
    wait = Phase("wait", (wall - 8 * MS, wall - 6 * MS), 0.0, 0.0)
    spans = (
        (Span(0, 0, 6 * MS, 6 * MS), Span(1, 6 * MS, 8 * MS, 9 * MS)),
        (Span(0, MS, 4 * MS, 6 * MS), Span(1, 6 * MS, 9 * MS, 9 * MS)),
    )
    return StageTimes("forward", 7, 2, 2, wall, (*phases, wait), spans)


def made_up_lines() -> list[profile_record.Line]:
    head = ProfileLine(**HEAD, case=TINY, why="w", isa="scalar", tp=1, workers=2)
    lines: list[profile_record.Line] = [head, CeilingLine(read=1e9, multiply=2e9), CeilingLine(read=2e9, multiply=1e9)]
    passes: tuple[tuple[Pass, int], ...] = (("first", 30), ("plain", 10), ("recorded", 11))
    for at, (which, ms) in enumerate(passes):
        ns = ms * MS
        stages = None if which == "plain" else made_up(10 * MS)
        part = CallPart(name="forward", at=0, ns=ns, stages=stages)
        lines.append(CallLine(range="forward_only", which=which, at=at * 50 * MS, ns=ns, parts=(part,)))
    return lines


def test_statistics_are_those_of_numpy() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    found = Statistics.of(values)
    assert (found.count, found.min, found.max) == (6, 1.0, 9.0)
    assert (found.mean, found.std, found.median) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1), np.median(values))
    )
    assert found.percentiles == pytest.approx({share: np.percentile(values, share) for share in PERCENTILES})
    assert Statistics.of([2.0]).std == 0.0
    with pytest.raises(ValueError, match="no time was measured"):
        Statistics.of([])


def test_the_clock_times_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100, 350])
    monkeypatch.setattr("ktverify.system.timing.time.perf_counter_ns", lambda: next(ticks))
    assert Clock().time(lambda: None) == 250


def test_a_device_is_waited_for_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, end: object) -> float:
            return 1.5

    cuda = SimpleNamespace(synchronize=lambda: calls.append("wait"), Event=Event)
    monkeypatch.setattr("torch.cuda", cuda)
    assert Clock("cuda:0").time(lambda: calls.append("call")) == 1_500_000
    assert calls == ["wait", "record", "call", "record", "wait"]


def test_workers_and_imbalance_of_a_made_up_call() -> None:
    times = made_up(10 * MS)
    assert worker_of(times, 0) == Worker(busy=8 * MS, barrier=MS, other=MS)
    assert worker_of(times, 1) == Worker(busy=6 * MS, barrier=2 * MS, other=2 * MS)
    assert imbalances(times) == [Imbalance(0, finish=2 * MS, begin=MS), Imbalance(1, finish=MS, begin=0)]


def summary_of(lines: list[profile_record.Line]) -> ProfileSummary:
    summary = ProfileSummary.of(lines)
    assert summary is not None
    return summary


def test_tables_of_a_made_up_profile() -> None:
    summary = summary_of(made_up_lines())
    assert (summary.read, summary.multiply) == (2e9, 2e9), "the best of the ceilings counts"
    ranges_, phases, workers = profile_views.view(summary, b"").grids
    # 10 of 11 ms are the engine's
    assert ranges_.rows == (("forward_only", "30.0", *["10.0"] * 5, "10.0 ± 0.0", "1.10", "90.9 %", "1.00"),)
    # 9e6 operations at 2e9 a second are 4.5 ms, in the 4.5 ms that the workers took on average; 4e6 bytes 2 of 2.5
    assert [row[-1] for row in phases.rows] == ["100.0 %", "80.0 %", "–", "65.0 %"]
    assert [row[3] for row in phases.rows] == ["45.0 %", "25.0 %", "30.0 %", "100.0 %"]
    assert workers.rows[0] == ("worker 0", "8.00", "1.00", "1.00", "80.0 %", "6.00", "2.00")
    assert "its last worker finishes 2.00 ms after its first, 20.0 % of the call" in workers.notes[1]
    assert profile_views.verdict(summary) == "forward 10.0 ms, most of it gate + up (+ LoRA B) (45.0 %)"


def test_a_busy_machine_is_reported() -> None:
    for others, wanted in ((0.3, "other programs had 30 % of the processors: these times mean little"), (0.01, "")):
        summary = summary_of([*made_up_lines(), OtherLoadLine(others=others)])
        assert profile_views.view(summary, b"").warning == wanted


def test_all_views_have_the_same_table(tmp_path: Path) -> None:
    summary = summary_of(made_up_lines())
    names = pages.write(profile_views.view(summary, b"not empty"), tmp_path)
    assert names == ["profile.md", "profile.html", "profile.tsv", "profile.png"]
    page, text = ((tmp_path / name).read_text() for name in names[:2][::-1])
    for cell in ("gate + up (+ LoRA B)", "90.9 %", "stamp, abc"):
        assert cell in page
        assert cell in text
    with (tmp_path / "profile.tsv").open(newline="") as file:
        assert [row["median"] for row in csv.DictReader(file, delimiter="\t")] == ["10", "11"]


# ---- real calls


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that take no time to measure."""
    monkeypatch.setattr("ktverify.bench.ceilings.measure", lambda *_: {"read": 1e10, "multiply": 1e11})


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def lines(request: pytest.FixtureRequest) -> list[profile_record.Line]:
    settings = profile.ProfileSettings(tp=request.param, threads=2, warmup=1, repeats=2, read_bytes=1 << 22)
    profiler = profile.Profiler(Case.parse(TP2), settings)
    found: list[profile_record.Line] = list(profiler.lines())
    assert len(found) == profiler.steps()
    head = made_up_lines()[0].model_copy(update={"workers": profiler.about["workers"]})
    return [head, *found]


def calls_of(lines: list[profile_record.Line]) -> list[CallLine]:
    return [line for line in lines if isinstance(line, CallLine)]


def test_every_range_has_its_calls_and_their_parts_follow_each_other(lines: list[profile_record.Line]) -> None:
    for name in RANGES:
        passes = [one.which for one in calls_of(lines) if one.range == name]
        assert passes == ["first", "warmup", *["plain", "recorded"] * 2]
    for one in calls_of(lines):
        names = [part.name for part in one.parts if part.name != profile.READING]
        step = [profile.FORWARD, profile.BACKWARD, profile.OPTIMIZER, profile.UPDATE]
        assert names == {RANGES[0]: step[:1], RANGES[1]: step[1:2], RANGES[2]: step}[one.range]
        directions = [times.direction for times in one.stages]
        assert directions == (names[:2] if one.which in ("first", "recorded") else [])
        end = 0
        for part in one.parts:
            assert part.at >= end
            end = part.at + part.ns
            if part.stages is not None:
                # the engine's call is inside of what Python saw of it, and its stages add up to it
                assert part.stages.wall_ns <= part.ns
                assert part.explained_ns == pytest.approx(part.stages.wall_ns)


def test_every_worker_is_accounted_for(lines: list[profile_record.Line]) -> None:
    for times in (times for one in calls_of(lines) for times in one.stages):
        for worker in range(times.workers):
            found = worker_of(times, worker)
            assert min(found.busy, found.barrier) >= 0
            assert found.busy + found.barrier + found.other == times.wall_ns
        assert len({stage_name(times, stage) for stage in range(times.stages)}) == times.stages


def lanes_of(workers: int) -> dict[int, str]:
    return {1: "Python", **{worker + 2: f"worker {worker}" for worker in range(workers)}}


def test_the_trace_is_one_that_perfetto_reads(lines: list[profile_record.Line]) -> None:
    head = lines[0]
    assert isinstance(head, ProfileLine)
    named, events = read_trace(profile_views.trace(lines))
    assert named == lanes_of(head.workers)
    shown = [event for event in events if event["cat"] == "engine"]
    assert len(shown) == sum(len(one.stages) for one in calls_of(lines))
    working = sum(event["dur"] for event in events if event["cat"] == "work")
    spans = [span for one in calls_of(lines) for times in one.stages for spans in times.spans for span in spans]
    assert working == pytest.approx(sum(span.work_end - span.begin for span in spans) / 1e3)


def test_an_overlap_in_a_lane_would_be_seen() -> None:
    nested([(0, 5), (1, 3), (5, 8)])
    with pytest.raises(AssertionError, match="overlaps"):
        nested([(0, 5), (4, 8)])


def test_ranges_carry_their_names_to_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        calls.append(f"+{name}")
        yield
        calls.append(f"-{name}")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate, __spec__=object()))
    timing._annotate.cache_clear()
    try:
        list(profile.Profiler(Case.parse(TINY), profile.ProfileSettings(threads=1, warmup=0, repeats=1)).lines())
    finally:
        timing._annotate.cache_clear()
    # the last step is recorded
    forward, backward = (profile.FORWARD, profile.READING), (profile.BACKWARD, profile.READING)
    step = [f"{sign}{part}" for part in (*forward, *backward, profile.OPTIMIZER, profile.UPDATE) for sign in "+-"]
    assert calls[-len(step) - 2 :] == ["+full_train_loop", *step, "-full_train_loop"]
    assert [calls.count(f"+{name}") for name in RANGES] == [3, 3, 3]


# ---- the command


def test_profile_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("profile", TINY, "--threads", "2", "--warmup", "1", "--repeats", "1")
    text = ends(call(*arguments, "--out", str(out)), 0)
    for wanted in ("forward_only: phases", "backward: workers", "full_train_loop: parts", "AdamW step", "trace.json"):
        assert wanted in text
    names = {"profile.jsonl", "profile.md", "profile.html", "profile.tsv", "profile.png", "trace.json"}
    assert {path.name for path in out.iterdir()} == names
    head = profile_record.read(out)[0]
    assert isinstance(head, ProfileLine)
    assert read_trace((out / "trace.json").read_text())[0] == lanes_of(head.workers)
    assert ends(call("profile", "--show", str(out)), 0) == text, "the lines contain all that was shown"
    shown = ends(call("profile", "--show", str(out), "--json"), 0)
    assert shown == (out / profile_record.FILE).read_text()
    refused(call(*arguments, "--out", str(out)), "profile.jsonl is there already: name another folder by --out")
    refused(call("profile", "small,T=0"), "T is 0, there is nothing to time")


def test_a_stopped_profile_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, made = profile.Profiler._call, [0]

    def stops(self: profile.Profiler, name: Any, which: Any) -> CallLine:
        made[0] += 1
        if made[0] == 5:
            raise KeyboardInterrupt
        return honest(self, name, which)

    monkeypatch.setattr(profile.Profiler, "_call", stops)
    out = tmp_path / "run"
    arguments = ("profile", TINY, "--threads", "1", "--warmup", "0", "--repeats", "1", "--out", str(out))
    text = ends(call(*arguments), 130)
    assert "forward_only" in text
    assert "backward_only" not in text
    # head, ceilings, three calls, ceilings, one call
    assert len(profile_record.read(out)) == 7
    with open(out / profile_record.FILE, "a") as file:
        file.write('{"kind": "call", "range": "forw')
    assert len(profile_record.read(out)) == 7, "a line that was cut off is left out"
    os.truncate(out / profile_record.FILE, 0)
    refused(call("profile", "--show", str(out)), "no range that was measured")


# ---- what a profile leaves unexplained

# scalar code takes ten milliseconds or more on any machine, so that Python's checks are a small part of the call
LARGE, ISA = "E=4,k=2,H=256,I=256,T=512,r=8", "scalar"


def test_waiting_that_belongs_to_no_stage_is_reported() -> None:
    assert profile_views.unexplained_ns(made_up(10 * MS)) == 1.5 * MS
    assert profile_views.unexplained_ns(made_up(12 * MS)) == 3.5 * MS, "time between the stages belongs to none"
    phases = profile_views.view(summary_of(made_up_lines()), b"").grids[1]
    assert phases.notes[1] == "other waiting: 1.50 ms, 15.0 % of the call, at no stage's barrier"


def test_the_stages_explain_a_large_call() -> None:
    profiler = profile.Profiler(Case.parse(LARGE), profile.ProfileSettings(isa=ISA, threads=2, warmup=1, repeats=2))
    calls = [line for line in profiler.lines() if isinstance(line, CallLine) and line.which == "recorded"]
    for name in (profile.FORWARD, profile.BACKWARD):
        parts = [part for one in calls for part in one.parts if part.name == name and part.stages is not None]
        assert len(parts) == 4
        shares = [part.stages.wall_ns / part.ns for part in parts if part.stages is not None]
        # another program may have had the processor around some of them
        assert 0.95 <= max(shares) <= 1


def test_no_part_of_a_step_ends_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor is taken away just before the step's own time begins."""
    profiler = profile.Profiler(Case.parse(TINY), profile.ProfileSettings(threads=1, warmup=0, repeats=1))
    honest, inside = profiler.clock.time, [False]

    def late(call: Callable[[], object]) -> int:
        if inside[0]:
            return honest(call)
        inside[0] = True
        time.sleep(2e-3)
        try:
            return honest(call)
        finally:
            inside[0] = False

    monkeypatch.setattr(profiler.clock, "time", late)
    for line in profiler.lines():
        if isinstance(line, CallLine):
            assert all(0 <= part.at <= part.at + part.ns <= line.ns for part in line.parts)
