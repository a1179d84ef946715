"""Measure engines side by side, in interleaved rounds, after their results were compared with the oracle.

One round is the forward of every engine (A B C), then a training step of every engine (A B C), then the machine's
ceilings. Each call gets the tokens in another order, and the results of some rounds are compared as well. Whatever else
the machine does in a round disturbs all engines alike. There are many short rounds, because minima are compared, and
another program may slow a processor down for seconds: the minimum needs one quiet round. Lines are written to the
journal as they are made.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ktverify.bench import input_files
from ktverify.bench.engines import OWN, Engine, EngineProcess
from ktverify.bench.groups import form_groups
from ktverify.bench.host import map_tensor
from ktverify.bench.input_files import OUTPUT_PLAIN, InputRequest
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
from ktverify.errors import EngineDied, Unsupported
from ktverify.isolation import process
from ktverify.spec.names import BACKWARD_TENSORS, OUTPUT
from ktverify.system import machine
from ktverify.system.timing import OtherLoad

# rounds, drawn anew each time, of which every timed result is compared with the oracle, beside the first and the last
_CHECKED = 2
# an engine is idle when its threads together had less than a tenth of the last hundredth of a second
_LOOK_S = 0.01
_IDLE_NS = 1_000_000
_RESTLESS_S = 2.0


class Progress(Protocol):
    """Receives the progress of a run."""

    def begin(self, text: str, steps: int) -> None: ...
    def say(self, text: str) -> None: ...
    def advance(self) -> None: ...


@dataclass(frozen=True)
class ShapeBenchSettings:
    """How to measure. rounds, warmup, threads, runs: counts; isa: "" for the best; pause_s: seconds between turns;
    patience_s: how long a turn waits for other programs to leave the processors alone.

    read_bytes: size of the memory that the bandwidth is measured on, well beyond any cache. recorded: number of
    training steps of the native engine whose stages are recorded, after the rounds.
    """

    rounds: int = 40
    warmup: int = 3
    threads: int = 2
    runs: int = 1
    isa: str = ""
    pause_s: float = 0.02
    patience_s: float = 0.2
    timeout_s: float = 900.0
    scratch: Path | None = None
    read_bytes: int = 1 << 29
    recorded: int = 5


@dataclass
class _Loaded:
    """One engine of a group and its process. timed: the directions with right results, which alone are timed."""

    engine: Engine
    process: EngineProcess
    line: EngineLine
    timed: list[str] = field(default_factory=list)


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
        """Measure all runs of one shape. After a KeyboardInterrupt the journal contains what was measured."""
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
                groups, left_out = form_groups(present, weights, active, available)
                for engine, reason in left_out:
                    self._leave_out(shape, run, engine, reason)
                for number, group in enumerate(groups):
                    _Group(self, shape, directory, manifest, run, number).measure(group)

    def _prepare(self, shape: Shape, directory: Path, *, plain: bool) -> dict[str, Any]:
        """Write the inputs and the oracle's results in a process of its own; returns the manifest."""
        input_files.check_space(shape.case, directory)
        request = InputRequest(
            case=shape.case.id,
            directory=str(directory),
            threads=self.settings.threads,
            plain=plain,
            on_grid=any(engine.bits < 16 for engine in self.engines),
        )
        try:
            (line,) = process.lines_of(input_files.__name__, request)
        except RuntimeError as error:
            raise RuntimeError(f"the inputs of {shape.name} could not be made: {error}") from None
        manifest: dict[str, Any] = json.loads(line)
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
                bits=engine.bits,
                forward="SKIP",
                backward="SKIP" if engine.backward else "UNSUPPORTED",
                reason=reason,
            )
        )


class _Group:
    """Engines that are in memory together, at one shape."""

    def __init__(
        self, bench: Bench, shape: Shape, directory: Path, manifest: dict[str, Any], run: int, number: int
    ) -> None:
        self.bench, self.settings, self.journal = bench, bench.settings, bench.journal
        self.shape, self.directory, self.manifest = shape, directory, manifest
        self.where: dict[str, Any] = {"shape": shape.name, "run": run, "group": number}
        self.loaded: list[_Loaded] = []
        self.restless: dict[str, None] = {}

    def measure(self, group: Sequence[Engine]) -> None:
        rounds = self.settings.warmup + self.settings.rounds
        titles = ", ".join(engine.title for engine in group)
        of = f" (run {self.where['run']} of {self.settings.runs})" if self.settings.runs > 1 else ""
        self.bench.progress.begin(f"{self.shape.name}{of}: {titles}", len(group) + rounds)
        ceilings = Engine(
            "ceilings",
            "ceilings",
            Path(__file__).with_name("ceilings.py"),
            0,
            False,
            False,
            False,
            Path(sys.executable),
        )
        ceiling = self._start(ceilings)
        try:
            for engine in group:
                self.bench.progress.say(f"loading and checking {engine.title}")
                self._load(engine)
                self.bench.progress.advance()
            rounds = self.settings.rounds
            self.checked = random.SystemRandom().sample(range(rounds), min(_CHECKED, rounds))
            self.load = OtherLoad(lambda: [ceiling, *(one.process for one in self.loaded)])
            for number in range(-self.settings.warmup, self.settings.rounds):
                self.bench.progress.say(f"round {number + 1}" if number >= 0 else "warm-up")
                self._round(number, ceiling)
                self.bench.progress.advance()
            share = self.load.share()
            self.journal.add(GroupOtherLoadLine(**self.where, others=share, restless=tuple(self.restless)))
            self._record_stages()
            for one in list(self.loaded):
                self._check(one, f"after {rounds} rounds: ")
        finally:
            for one in self.loaded:
                one.process.close()
            ceiling.close()

    def _start(self, engine: Engine) -> EngineProcess:
        s = self.settings
        return EngineProcess(engine, threads=s.threads, isa=s.isa, timeout_s=s.timeout_s)

    def _load(self, engine: Engine) -> None:
        """Load one engine and check its results; if it cannot be loaded, a line contains the reason."""
        line = EngineLine(
            **self.where,
            engine=engine.name,
            title=engine.title,
            lora=engine.lora,
            bits=engine.bits,
            forward="PASS",
            backward="PASS" if engine.backward else "UNSUPPORTED",
        )
        one = _Loaded(engine, self._start(engine), line)
        self.loaded.append(one)
        try:
            loaded = one.process.ask(
                "load",
                directory=str(self.directory),
                threads=self.settings.threads,
                isa=self.settings.isa,
                options=engine.options,
            )
        except (EngineDied, Unsupported) as error:
            self._remove(one, "while loading: ", error)
            return
        one.line = line.model_copy(
            update={"about": loaded["about"], "resident": loaded["resident"], "load_ns": loaded["ns"]}
        )
        if self._check(one, ""):
            self.journal.add(one.line)

    def _check(self, one: _Loaded, when: str) -> bool:
        """Compute once more and compare with the oracle. A direction with a wrong result is no longer timed."""
        before = one.line
        results = self.directory / "results"
        try:
            one.process.ask("forward")
            found = self._compare(one, results, (OUTPUT,))
            wrong = first_wrong(found)
            if wrong:
                backward = "FAIL" if one.engine.backward else "UNSUPPORTED"
                one.line = before.model_copy(
                    update={"forward": "FAIL", "backward": backward, "reason": when + wrong, "rel_l2": errors_of(found)}
                )
            else:
                update: dict[str, Any] = {}
                if one.engine.backward and before.backward == "PASS":
                    try:
                        one.process.ask("backward")
                    except Unsupported as declared:
                        update = {"backward": "UNSUPPORTED", "reason": f"{when}backward: {declared}"}
                    else:
                        found |= self._compare(one, results, (OUTPUT, *BACKWARD_TENSORS))
                        wrong = first_wrong(found)
                        update = {"backward": "FAIL", "reason": when + wrong} if wrong else {}
                one.line = before.model_copy(update=update | {"rel_l2": {**before.rel_l2, **errors_of(found)}})
        except (EngineDied, Unsupported) as error:
            self._remove(one, when, error)
            return False
        finally:
            shutil.rmtree(results, ignore_errors=True)
        if when and (one.line.forward, one.line.backward) != (before.forward, before.backward):
            self.journal.add(one.line)
        one.timed = [what for what in ("forward", "backward") if getattr(one.line, what) == "PASS"]
        return True

    def _check_turn(self, one: _Loaded, what: str, number: int) -> None:
        """Compare what a timed call computed with the oracle. A direction with a wrong result is no longer timed."""
        results, names = self.directory / "results", (OUTPUT,) if what == "forward" else (OUTPUT, *BACKWARD_TENSORS)
        wrong = first_wrong(self._compare(one, results, names))
        shutil.rmtree(results)
        if wrong:
            # a backward after a wrong forward is worth nothing
            bad = [name for name in one.timed if name == what or what == "forward"]
            reason = {"reason": f"in round {number + 1}: {wrong}"}
            one.line = one.line.model_copy(update=dict.fromkeys(bad, "FAIL") | reason)
            one.timed = [name for name in one.timed if name not in bad]
            self.journal.add(one.line)

    def _compare(self, one: _Loaded, results: Path, names: Sequence[str]) -> dict[str, float | str]:
        """rel_l2 of each tensor in `names`, or what is wrong with it."""
        results.mkdir(exist_ok=True)
        written = one.process.ask("write", directory=str(results))["tensors"]
        files = {name: OUTPUT_PLAIN if name == OUTPUT and not one.engine.lora else name for name in names}
        entries, folder = self.manifest["expected"], self.directory / "expected"
        expected = {name: map_tensor(folder / file, **entries[file]) for name, file in files.items()}
        actual = {name: map_tensor(results / name, **written[name]) for name in names if name in written}
        return compare_results(actual, expected)

    def _ask(self, process: EngineProcess, do: str, **arguments: Any) -> tuple[dict[str, Any], float]:
        """The answer to a timed request, and the share of the processors that other programs had meanwhile."""
        self.load.wait(self.settings.patience_s)
        before = self.load.read()
        answer = process.ask(do, **arguments)
        return answer, self.load.share(before)

    def _round(self, number: int, ceiling: EngineProcess) -> None:
        """Measure one round. Rounds below 0 are warm-ups and write no line."""
        for what in ("forward", "backward"):
            for one in [one for one in self.loaded if what in one.timed]:
                try:
                    times, others = self._ask(one.process, what)
                    if number in self.checked:
                        self._check_turn(one, what, number)
                except (EngineDied, Unsupported) as error:
                    self._remove(one, f"in {f'round {number + 1}' if number >= 0 else 'a warm-up'}: ", error)
                    continue
                for name, ns in times.items() if number >= 0 else ():
                    turn = {"round": number, "engine": one.engine.name, "what": name, "ns": ns, "others": others}
                    self.journal.add(TurnLine.model_validate({**self.where, **turn}))
                self._settle(one.process)
        own = next((one.line.about.get("isa", "") for one in self.loaded if one.engine.name == OWN), "")
        s = self.settings
        asked = {"threads": s.threads, "isa": own or s.isa, "read_bytes": s.read_bytes}
        answer, others = self._ask(ceiling, "call", function="measure", arguments=asked)
        if number >= 0:
            self.journal.add(RoundCeilingLine(**self.where, round=number, **answer["value"], others=others))
        self._settle(ceiling)

    def _record_stages(self) -> None:
        """Record the stages of some training steps of the native engine, in the first group."""
        own = next((one for one in self.loaded if one.engine.name == OWN and "backward" in one.timed), None)
        if own is None or self.where["group"] > 0:
            return
        for _ in range(self.settings.recorded):
            try:
                steps = own.process.ask("stages")["steps"]
            except EngineDied as died:
                self._remove(own, "while its stages were recorded: ", died)
                return
            for step in steps:
                self.journal.add(StagesLine(**self.where, times=StageTimes.of(step)))

    def _settle(self, process: EngineProcess) -> None:
        """Wait until the threads of `process` sleep: workers may spin for a while after a call has returned."""
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

    def _remove(self, one: _Loaded, when: str, error: EngineDied | Unsupported) -> None:
        """Remove an engine whose process has ended or whose call raised; the others continue."""
        one.process.close()
        self.loaded = [other for other in self.loaded if other is not one]
        verdict = "UNSUPPORTED" if isinstance(error, Unsupported) else error.verdict
        verdicts = {"forward": verdict, "backward": verdict if one.engine.backward else "UNSUPPORTED"}
        self.journal.add(one.line.model_copy(update={**verdicts, "reason": f"{when}{error}"}))
