"""A bench run as the scoreboard shows it."""

from __future__ import annotations

from pathlib import Path

from ktverify.bench.engines import OWN
from ktverify.bench.record import HeadLine, read
from ktverify.bench.summary import EngineSummary, ShapeSummary, summarise
from ktverify.report.scoreboard import BenchSummary, CallSpeed, ScoredMachine, SpeedScore


def bench_summary(directory: Path) -> BenchSummary:
    """The summary of a run of `bench shapes`. ValueError where it was stopped, or measured no time."""
    lines = read(directory)
    head = next((line for line in lines if isinstance(line, HeadLine)), None)
    summaries = summarise(lines)
    if head is None or any(not any(engine.timings for engine in each.engines) for each in summaries):
        raise ValueError(f"{directory} is no run for the scoreboard: it was stopped, and a shape has no times")
    scores = [_score(shape, engine) for shape in summaries for engine in shape.engines]
    if not scores:
        raise ValueError(f"{directory} is no run for the scoreboard: it has no times")
    return BenchSummary(
        engine="bench",
        command=head.command,
        commit=head.commit,
        at=_started(head.stamp),
        machine=ScoredMachine.of(head.machine),
        stamp=head.stamp,
        threads=head.threads,
        scores=tuple(scores),
    )


def _score(shape: ShapeSummary, engine: EngineSummary) -> SpeedScore:
    def call(what: str) -> CallSpeed | None:
        timing = engine.timings.get(what)
        if timing is None:
            return None
        over = timing.over_roofline
        return CallSpeed(ms=timing.ms.min, over_limit=None if over is None else over.value)

    line = engine.line
    missing = [f"{what} {verdict}" for what in ("forward", "backward") if (verdict := engine.verdict(what)) != "PASS"]
    return SpeedScore(
        engine=line.engine,
        title=line.title,
        shape=shape.shape.shape,
        isa=line.about.get("isa", "") if line.engine == OWN or line.about.get("isa") != "torch" else "",
        lora=line.lora,
        forward=call("forward"),
        backward=call("backward"),
        reason=": ".join(filter(None, [", ".join(missing), line.reason])),
    )


def _started(stamp: str) -> float:
    """Seconds since 1970 of a run's stamp. ValueError for a name that does not begin with one."""
    from datetime import datetime, timezone

    try:
        return datetime.strptime(stamp[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        raise ValueError(f"a bench run is called {stamp!r}; its folder's name has to begin with a stamp") from None
