"""The time that a profile leaves unexplained: exact for a made-up call, bounded for a real one that is large enough.

No time is judged alone: the engine's is compared with what Python saw of the same call.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ktverify.bench.layer import profile, profile_tables
from ktverify.bench.layer.profile_record import CallLine
from ktverify.bench.layer.profile_summary import unexplained_ns
from ktverify.spec.cases import Case
from tests.bench.test_profile import MS, made_up, made_up_lines, summary_of
from tests.cli.test_cli import TINY

# scalar code takes ten milliseconds or more on any machine, so that Python's checks are a small part of the call
LARGE, ISA = "E=4,k=2,H=256,I=256,T=48,r=8", "scalar"


def test_waiting_that_belongs_to_no_stage_is_reported() -> None:
    assert unexplained_ns(made_up(10 * MS)) == 1.5 * MS
    assert unexplained_ns(made_up(12 * MS)) == 3.5 * MS, "time between the stages belongs to none"
    phases = profile_tables.view(summary_of(made_up_lines()), b"").grids[1]
    assert phases.notes[1] == "other waiting: 1.50 ms, 15.0 % of the call, at no stage's barrier"


def test_the_stages_explain_a_large_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktverify.bench.ceilings.measure", lambda *_: {"read": 1e10, "multiply": 1e11})
    profiler = profile.Profiler(Case.parse(LARGE), profile.ProfileSettings(isa=ISA, threads=2, warmup=1, repeats=2))
    calls = [line for line in profiler.lines() if isinstance(line, CallLine) and line.which == "recorded"]
    for name in (profile.FORWARD, profile.BACKWARD):
        parts = [part for one in calls for part in one.parts if part.name == name and part.stages is not None]
        assert len(parts) == 4
        shares = [part.stages.wall_ns / part.ns for part in parts if part.stages is not None]
        # another program may have had the processor around some of them
        assert 0.95 <= max(shares) <= 1


def test_no_part_of_a_step_ends_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor is taken away just before the step's own time begins."""
    monkeypatch.setattr("ktverify.bench.ceilings.measure", lambda *_: {"read": 1e10, "multiply": 1e11})
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
