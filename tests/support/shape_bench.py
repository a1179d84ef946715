"""What tests of `bench shapes` share: a tiny shape, and a run of it over given engines."""

from __future__ import annotations

from pathlib import Path

from ktverify.bench import shapes
from ktverify.bench.engines import Engine
from ktverify.bench.measure import Bench, ShapeBenchSettings
from ktverify.bench.record import BenchJournal, HeadLine, TurnLine
from ktverify.spec.cases import Case
from tests.support.records import HEAD

SHAPE = shapes.Shape("tiny", "small enough to wait for", Case.parse("E=4,k=2,H=64,I=32,T=17,r=8"))
ROUNDS = 3
SETTINGS = ShapeBenchSettings(rounds=ROUNDS, warmup=1, threads=1, pause_s=0.0, patience_s=0.0, read_bytes=1 << 22)


class Silent:
    def begin(self, text: str, steps: int) -> None: ...
    def say(self, text: str) -> None: ...
    def advance(self) -> None: ...


def head(names: list[str]) -> HeadLine:
    return HeadLine(**HEAD, engines=tuple(names), threads=1, rounds=ROUNDS, warmup=1, runs=1, isa="")


def measured(folder: Path, found: list[Engine]) -> BenchJournal:
    """One run of these engines over one shape."""
    written = BenchJournal(folder)
    written.add(head([engine.name for engine in found]))
    Bench(found, SETTINGS, written, Silent()).measure(SHAPE)
    written.close()
    return written


def turns(journal: BenchJournal, engine: str) -> list[TurnLine]:
    return [line for line in journal.lines if isinstance(line, TurnLine) and line.engine == engine]


def pretended(name: str, held: float, missing: str = "") -> Engine:
    return Engine(name, name, Path(f"{name}.py"), held, name == "native", True, True, Path("python"), missing=missing)
