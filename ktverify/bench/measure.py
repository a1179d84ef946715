"""Runs the bench: engines in turn, round after round, after their results were found right.

Comes in: shapes, engines, settings. Goes out: lines into a journal, as they are made. One round is: forward of every
engine, A B C, then a training step of every engine, A B C, then the machine's ceilings; so whatever the machine does
meanwhile, it does to all alike, and ratios are taken within a round.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ktverify.bench import problem
from ktverify.bench.engines import OWN, Engine, EngineProcess
from ktverify.bench.host import map_tensor
from ktverify.bench.record import (
    BenchJournal,
    EngineLine,
    GroupOtherLoadLine,
    RoundCeilingLine,
    ShapeLine,
    StagesLine,
    TurnLine,
)
from ktverify.bench.results import compare_results, errors_of, first_wrong
from ktverify.bench.shapes import Shape, backward_work, forward_work, weight_bytes
from ktverify.engines.native.phase_times import StageTimes
from ktverify.errors import EngineDied
from ktverify.spec.names import BACKWARD_TENSORS, OUTPUT
from ktverify.system import machine
from ktverify.system.other_load import OtherLoad
from ktverify.system.paths import ROOT

# an interpreter with torch; the memory that the bandwidth is measured on, with its process; what the system should keep
_PROCESS_BYTES = 500 << 20
_CEILING_BYTES = 600 << 20
_RESERVE = 0.04

# an engine is idle when its threads together had less than a tenth of the last hundredth of a second
_LOOK_S = 0.01
_IDLE_NS = 1_000_000
_RESTLESS_S = 2.0


class Progress(Protocol):
    """What the bench tells whoever watches."""

    def begin(self, text: str, steps: int) -> None: ...
    def say(self, text: str) -> None: ...
    def advance(self) -> None: ...


@dataclass(frozen=True)
class ShapeBenchSettings:
    """How to measure. rounds, warmup, threads, runs: counts; isa: "" for the best; pause_s: seconds between
    turns; patience_s: how long a turn waits for other programs to leave the processors alone.

    read_bytes: the memory that the bandwidth is measured on, well beyond any cache. recorded: training steps of the
    native engine whose stages are recorded, after the rounds.
    """

    rounds: int = 15
    warmup: int = 3
    threads: int = 2
    runs: int = 1
    isa: str = ""
    pause_s: float = 0.02
    patience_s: float = 1.0
    timeout_s: float = 900.0
    scratch: Path | None = None
    read_bytes: int = 1 << 29
    recorded: int = 5


@dataclass
class _Seat:
    """One engine of a group while it is being measured. timed: what of it is right, and therefore timed."""

    engine: Engine
    process: EngineProcess
    line: EngineLine
    timed: list[str] = field(default_factory=list)


def plan(
    engines: Sequence[Engine], weights: int, active: int, available: int
) -> tuple[list[list[Engine]], list[tuple[Engine, str]]]:
    """Who is measured together: (groups, [(engine, why it does not fit)]).

    weights, active (the weights of experts that tokens reach), available: bytes. All in one group where memory allows,
    else the native engine with one peer at a time, still interleaved: every ratio is against the native engine in the
    same rounds.
    """

    def needed(group: Sequence[Engine]) -> int:
        return (
            sum(int(engine.held * (active if engine.lazy else weights)) + _PROCESS_BYTES for engine in group)
            + _CEILING_BYTES
        )

    room = int(available * (1 - _RESERVE))
    if needed(engines) <= room:
        return [list(engines)], []
    own = [engine for engine in engines if engine.name == OWN]
    groups, left_out = [], []
    for engine in engines:
        if engine.name == OWN:
            continue
        pair = [*own, engine]
        if needed(pair) <= room:
            groups.append(pair)
        else:
            left_out.append(
                (engine, f"needs {needed(pair) / 1e9:.1f} GB with the native engine; {room / 1e9:.1f} free")
            )
    if not groups and own:
        if needed(own) <= room:
            groups.append(own)
        else:
            left_out.append((own[0], f"needs {needed(own) / 1e9:.1f} GB; {room / 1e9:.1f} are free"))
    return groups, left_out


class Bench:
    """One run of the bench over some shapes."""

    def __init__(
        self, engines: Sequence[Engine], settings: ShapeBenchSettings, journal: BenchJournal, progress: Progress
    ) -> None:
        self.engines = list(engines)
        self.settings = settings
        self.journal = journal
        self.progress = progress

    def measure(self, shape: Shape) -> None:
        """All runs of one shape. KeyboardInterrupt passes through; what was measured is in the journal."""
        with tempfile.TemporaryDirectory(prefix="ktverify-bench-", dir=self.settings.scratch) as name:
            directory = Path(name)
            present = [engine for engine in self.engines if not engine.missing]
            self.progress.begin(f"{shape.name}: inputs and oracle", 0)
            manifest = self._prepare(shape, directory, plain=any(not engine.lora for engine in present))
            self._write_shape(shape, int(manifest["active"]))
            for run in range(1, self.settings.runs + 1):
                for engine in self.engines:
                    if engine.missing:
                        self._leave_out(shape, run, engine, engine.missing)
                weights = weight_bytes(shape.case, shape.case.num_experts)
                active = weight_bytes(shape.case, int(manifest["active"]))
                available = machine.read_machine().memory_available_bytes
                groups, left_out = plan(present, weights, active, available)
                for engine, reason in left_out:
                    self._leave_out(shape, run, engine, reason)
                for number, group in enumerate(groups):
                    _Group(self, shape, directory, manifest, run, number).measure(group)

    def _prepare(self, shape: Shape, directory: Path, *, plain: bool) -> dict[str, Any]:
        import json

        problem.check_space(shape.case, directory)
        arguments = [shape.case.id, str(directory), str(self.settings.threads), *(["--plain"] if plain else [])]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", problem.__name__, *arguments],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate()
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"the inputs of {shape.name} could not be made (exit code {process.returncode}): {last}")
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        return manifest

    def _write_shape(self, shape: Shape, active: int) -> None:
        forward, backward = forward_work(shape.case, active), backward_work(shape.case, active)
        self.journal.add(
            ShapeLine(
                shape=shape.name,
                why=shape.why,
                case=shape.case.id,
                active=active,
                weight_bytes=weight_bytes(shape.case, shape.case.num_experts),
                forward_bytes=forward.bytes,
                forward_flops=forward.flops,
                backward_bytes=backward.bytes,
                backward_flops=backward.flops,
            )
        )

    def _leave_out(self, shape: Shape, run: int, engine: Engine, reason: str) -> None:
        self.journal.add(
            EngineLine(
                shape=shape.name,
                run=run,
                group=0,
                engine=engine.name,
                title=engine.title,
                lora=engine.lora,
                forward="SKIP",
                backward="SKIP" if engine.backward else "UNSUPPORTED",
                reason=reason,
            )
        )


class _Group:
    """Some engines that are in memory together, at one shape."""

    def __init__(
        self, bench: Bench, shape: Shape, directory: Path, manifest: dict[str, Any], run: int, number: int
    ) -> None:
        self.bench, self.settings, self.journal = bench, bench.settings, bench.journal
        self.shape, self.directory, self.manifest = shape, directory, manifest
        self.place: dict[str, Any] = {"shape": shape.name, "run": run, "group": number}
        self.seats: list[_Seat] = []
        self.restless: dict[str, None] = {}

    def measure(self, group: Sequence[Engine]) -> None:
        rounds = self.settings.warmup + self.settings.rounds
        titles = ", ".join(engine.title for engine in group)
        of = f" (run {self.place['run']} of {self.settings.runs})" if self.settings.runs > 1 else ""
        self.bench.progress.begin(f"{self.shape.name}{of}: {titles}", len(group) + rounds)
        ceilings = Engine(
            "ceilings", "ceilings", Path(__file__).with_name("ceilings.py"), 0, False, False, False, _own()
        )
        ceiling = self._start(ceilings)
        try:
            for engine in group:
                self.bench.progress.say(f"loading and checking {engine.title}")
                self._load(engine)
                self.bench.progress.advance()
            self.load = OtherLoad(lambda: [ceiling, *(seat.process for seat in self.seats)])
            for number in range(-self.settings.warmup, self.settings.rounds):
                self.bench.progress.say(f"round {number + 1}" if number >= 0 else "warm-up")
                self._round(number, ceiling)
                self.bench.progress.advance()
            share = self.load.share()
            self.journal.add(GroupOtherLoadLine(**self.place, others=share, restless=tuple(self.restless)))
            self._record_stages()
            for seat in list(self.seats):
                self._check(seat, f"after {rounds} rounds: ")
        finally:
            for seat in self.seats:
                seat.process.close()
            ceiling.close()

    def _start(self, engine: Engine) -> EngineProcess:
        s = self.settings
        return EngineProcess(engine, threads=s.threads, isa=s.isa, timeout_s=s.timeout_s)

    def _load(self, engine: Engine) -> None:
        """Load one engine and compare its results; it gets a seat, or a line that says why not."""
        line = EngineLine(
            **self.place,
            engine=engine.name,
            title=engine.title,
            lora=engine.lora,
            forward="PASS",
            backward="PASS" if engine.backward else "UNSUPPORTED",
        )
        seat = _Seat(engine, self._start(engine), line)
        self.seats.append(seat)
        try:
            loaded = seat.process.ask(
                "load",
                directory=str(self.directory),
                threads=self.settings.threads,
                isa=self.settings.isa,
                options=engine.options,
            )
        except EngineDied as died:
            self._drop(seat, f"while loading: {died}")
            return
        seat.line = line.model_copy(
            update={"about": loaded["about"], "resident": loaded["resident"], "load_ns": loaded["ns"]}
        )
        if self._check(seat, ""):
            self.journal.add(seat.line)

    def _check(self, seat: _Seat, when: str) -> bool:
        """Compute once more and compare with the oracle. What is wrong loses its time; a line says so."""
        before = seat.line
        results = self.directory / "results"
        try:
            seat.process.ask("forward")
            found = self._compare(seat, results, (OUTPUT,))
            wrong = first_wrong(found)
            if wrong:
                backward = "FAIL" if seat.engine.backward else "UNSUPPORTED"
                seat.line = before.model_copy(
                    update={"forward": "FAIL", "backward": backward, "reason": when + wrong, "rel_l2": errors_of(found)}
                )
            elif seat.engine.backward and before.backward == "PASS":
                seat.process.ask("backward")
                found |= self._compare(seat, results, (OUTPUT, *BACKWARD_TENSORS))
                wrong = first_wrong(found)
                update: dict[str, Any] = {"rel_l2": {**before.rel_l2, **errors_of(found)}}
                if wrong:
                    update |= {"backward": "FAIL", "reason": when + wrong}
                seat.line = before.model_copy(update=update)
            else:
                seat.line = before.model_copy(update={"rel_l2": {**before.rel_l2, **errors_of(found)}})
        except EngineDied as died:
            self._drop(seat, when + str(died))
            return False
        finally:
            shutil.rmtree(results, ignore_errors=True)
        if when and (seat.line.forward, seat.line.backward) != (before.forward, before.backward):
            self.journal.add(seat.line)
        seat.timed = [what for what in ("forward", "backward") if getattr(seat.line, what) == "PASS"]
        return True

    def _compare(self, seat: _Seat, results: Path, names: Sequence[str]) -> dict[str, float | str]:
        """rel_l2 of each tensor in `names`, or what is wrong with it."""
        results.mkdir(exist_ok=True)
        written = seat.process.ask("write", directory=str(results))["tensors"]
        files = {name: problem.OUTPUT_PLAIN if name == OUTPUT and not seat.engine.lora else name for name in names}
        entries, folder = self.manifest["expected"], self.directory / "expected"
        expected = {name: map_tensor(folder / file, **entries[file]) for name, file in files.items()}
        actual = {name: map_tensor(results / name, **written[name]) for name in names if name in written}
        return compare_results(actual, expected)

    def _round(self, number: int, ceiling: EngineProcess) -> None:
        """One round; negative numbers are warm-ups and leave no line."""
        for what in ("forward", "backward"):
            for seat in [seat for seat in self.seats if what in seat.timed]:
                self.load.wait(self.settings.patience_s)
                before = self.load.read()
                try:
                    times = seat.process.ask(what)
                except EngineDied as died:
                    self._drop(seat, f"in {f'round {number + 1}' if number >= 0 else 'a warm-up'}: {died}")
                    continue
                others = self.load.share(before)
                if number >= 0:
                    for name, ns in times.items():
                        self._add_turn(number, seat.engine.name, name, ns, others)
                self._settle(seat.process)
        own = next((seat.line.about.get("isa", "") for seat in self.seats if seat.engine.name == OWN), "")
        asked = {
            "threads": self.settings.threads,
            "isa": own or self.settings.isa,
            "read_bytes": self.settings.read_bytes,
        }
        self.load.wait(self.settings.patience_s)
        before = self.load.read()
        value = ceiling.ask("call", function="measure", arguments=asked)["value"]
        others = self.load.share(before)
        if number >= 0:
            self.journal.add(RoundCeilingLine(**self.place, round=number, **value, others=others))
        self._settle(ceiling)

    def _record_stages(self) -> None:
        """The stages of some training steps of the native engine, in the first group that has it."""
        own = next((seat for seat in self.seats if seat.engine.name == OWN and "backward" in seat.timed), None)
        if own is None or self.place["group"] > 0:
            return
        for _ in range(self.settings.recorded):
            try:
                steps = own.process.ask("stages")["steps"]
            except EngineDied as died:
                self._drop(own, f"while its stages were recorded: {died}")
                return
            for step in steps:
                self.journal.add(StagesLine(**self.place, times=StageTimes.of(step)))

    def _add_turn(self, number: int, engine: str, what: Any, ns: int, others: float) -> None:
        self.journal.add(TurnLine(**self.place, round=number, engine=engine, what=what, ns=ns, others=others))

    def _settle(self, process: EngineProcess) -> None:
        """Wait until the threads of `process` sleep: workers may look for work a while after a call has returned."""
        time.sleep(self.settings.pause_s)
        deadline = time.monotonic() + _RESTLESS_S
        before = process.cpu_ns()
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            after = process.cpu_ns()
            if after - before < _IDLE_NS:
                return
            before = after
        self.restless[process.engine.name] = None

    def _drop(self, seat: _Seat, reason: str) -> None:
        """The engine is gone; the others go on."""
        seat.process.close()
        self.seats = [other for other in self.seats if other is not seat]
        crashed = {"forward": "CRASH", "backward": "CRASH" if seat.engine.backward else "UNSUPPORTED"}
        self.journal.add(seat.line.model_copy(update={**crashed, "reason": reason}))


def _own() -> Path:
    return Path(sys.executable)
