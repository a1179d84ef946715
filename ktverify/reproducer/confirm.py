"""Every accusation of a run again, without the suite: each case's folder in the engine's own interpreter.

Comes in: a run. Goes out: a Finding for each accusation, and below the run's directory a folder for each case, with
what its script printed. The tensors that a script saves are judged here by the gates that accused.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile, groupby
from pathlib import Path

import torch

from ktverify.checks.problem import LiveOracle
from ktverify.checks.repro_commands import isa_name
from ktverify.engines import registry
from ktverify.isolation.hosted import Hosted
from ktverify.isolation.process import how_it_ended
from ktverify.judge.gates import Verdict, judge
from ktverify.reproducer.bundle import ACTUAL_FILE, SCRIPT, Setting, script_of, write
from ktverify.reproducer.claims import Accusation, Place, accusations, error_text
from ktverify.runs.store import Run
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.files import write_whole

FOLDER = "confirm"
# what corrupts memory does not end a process each time
TRIES = 3
# characters of a script's last line that are shown
LINE = 60
_TRACEBACK = "Traceback (most recent call last):\n"
_CODE = re.compile(r"\b(?:ended with exit code|SystemExit:) (\d+)\b")


@dataclass(frozen=True)
class Finding:
    """An accusation, whether it was confirmed, and what was found without the suite, in few words.

    ran: False where the script failed by itself, so that nothing is known of the engine.
    """

    accusation: Accusation
    confirmed: bool
    alone: str
    ran: bool = True


@dataclass(frozen=True)
class Alone:
    """How one run of a script ended: "" where it saved its tensors, else "SIGSEGV", "no answer", exit code or error.

    gave_up: it left by itself, without tensors; the error is whole.
    """

    ended: str
    gave_up: bool = False
    actual: dict[str, torch.Tensor] | None = None


def interpreter_of(engine: str) -> str:
    """The engine's own interpreter. ValueError where there is none."""
    factory = registry.find(engine)
    return factory.check() if isinstance(factory, Hosted) else sys.executable


def confirm(run: Run, *, time_limit: float, done: Callable[[int, int], None]) -> list[Finding]:
    """A finding for each accusation of `run`. time_limit: seconds for one script; done(cases, of) after each.

    ValueError for a run whose head was lost, or whose engine brings no script.
    """
    if run.head is None:
        raise ValueError(f"{run.directory}: its head was lost, so nobody knows which engine it judged")
    engine = run.head.engine
    groups = [(place, list(told)) for place, told in groupby(accusations(run.records), lambda a: a.place)]
    if not groups:
        return []
    script, python = script_of(engine), interpreter_of(engine)
    findings: list[Finding] = []
    for number, (place, told) in enumerate(groups):
        done(number, len(groups))
        again = _Again(place, engine, script, run.directory / FOLDER / folder_name(place), python)
        findings += again.findings(told, time_limit)
    done(len(groups), len(groups))
    return findings


def folder_name(place: Place) -> str:
    """A file name for a place: "large@seed=0" -> "large", "small@seed=1" at TP 2 -> "small@seed=1.tp2"."""
    parts = (Case.parse(place.case).brief, f"tp{place.tp}" if place.tp != 1 else "", isa_name(place.isa))
    return ".".join(part for part in parts if part)


class _Again:
    """One case at one place, written to its folder and run there."""

    def __init__(self, place: Place, engine: str, script: Path, folder: Path, python: str) -> None:
        self.place, self.engine, self.script, self.folder, self.python = place, engine, script, folder, python
        self.case = Case.parse(place.case)

    def findings(self, told: list[Accusation], time_limit: float) -> list[Finding]:
        """What the script shows of each; it gets more tries as long as something stays unconfirmed."""
        inputs = make_inputs(self.case)
        self.oracle = LiveOracle.of(inputs)
        write(inputs, self.oracle, self.script, self.folder, Setting(self.place.tp, isa=isa_name(self.place.isa)))
        best: list[Finding] = []
        for _ in range(TRIES):
            alone = self._run(time_limit)
            now = [self._finding(accusation, alone) for accusation in told]
            best = [a if a.confirmed else b for a, b in zip(best or now, now, strict=True)]
            if all(finding.confirmed for finding in best):
                break
        return best

    def _run(self, time_limit: float) -> Alone:
        actual = self.folder / ACTUAL_FILE
        actual.unlink(missing_ok=True)
        environment = dict(os.environ)
        if self.python != sys.executable:
            # they lead to packages of this interpreter
            environment = {name: v for name, v in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        with tempfile.TemporaryFile() as log:
            code = _wait([self.python, str(self.folder / SCRIPT)], environment, log.fileno(), time_limit)
            log.seek(0)
            said = log.read().decode(errors="replace")
        write_whole(self.folder / "output.txt", said)
        if code is None:
            return Alone("no answer")
        if code < 0:
            return Alone(signal.Signals(-code).name)
        if not actual.is_file():
            how = f"it ended without {ACTUAL_FILE}" if code == 0 else how_it_ended(code)
            # Python's own code for every error: only the text says which
            return Alone((_error_in(said) if code == 1 else "") or how, gave_up=True)
        from safetensors.torch import load

        return Alone("", actual=load(actual.read_bytes()))

    def _finding(self, accusation: Accusation, alone: Alone) -> Finding:
        if alone.gave_up:
            confirmed = accusation.verdict == "CRASH" and _same_end(accusation, alone.ended)
            text = alone.ended[:LINE]
            return Finding(accusation, confirmed, text if confirmed else f"could not be run: {text}", ran=confirmed)
        if accusation.verdict == "TIMEOUT":
            return Finding(accusation, alone.ended == "no answer", alone.ended or "answered")
        if accusation.verdict == "CRASH":
            return Finding(accusation, alone.ended not in ("", "no answer"), alone.ended or "computed")
        if alone.actual is None:
            return Finding(accusation, False, alone.ended)
        wrong = dict(self._wrong(alone.actual, accusation.exact))
        if not accusation.tensor:
            return Finding(accusation, bool(wrong), "; ".join(f"{n} {text}" for n, text in wrong.items()) or "right")
        return Finding(accusation, accusation.tensor in wrong, wrong.get(accusation.tensor, "right"))

    def _wrong(self, actual: dict[str, torch.Tensor], exact: bool) -> Iterator[tuple[str, str]]:
        """(name, what is wrong) of each tensor that does not pass."""
        own, isa = registry.strict(self.engine), isa_name(self.place.isa)
        for name in ALL_TENSORS:
            if name not in actual:
                yield name, "missing"
                continue
            difference = self.oracle.compare(name, actual[name])
            judgement = judge(self.case, name, difference, self.oracle.peer[name], own_engine=own, isa=isa)
            if exact and difference.mismatched:
                yield name, f"{difference.mismatched} of {difference.numel} elements differ"
            elif not exact and judgement.verdict is Verdict.FAIL:
                yield name, error_text(difference.rel_l2, difference.non_finite)


def _error_in(said: str) -> str:
    """The error that a script's output ends with, in one line: "ValueError: …", or what sys.exit was given."""
    _, traced, end = said.rpartition(_TRACEBACK)
    lines = end.strip("\n").splitlines()
    error = dropwhile(lambda line: line.startswith(" "), lines) if traced else lines[-1:]
    return " ".join(" ".join(error).split())


def _same_end(accusation: Accusation, ended: str) -> bool:
    """True where a script's end is what the suite was told as well: the exit code, or the error with its text, whole.

    Any other error is the script's own: it does not parse, lacks a module or a file, or calls what is not there.
    A name without a text, like AssertionError, may be both.
    """
    if code := _CODE.fullmatch(ended):
        told = _CODE.search(accusation.message)
        return told is not None and int(told.group(1)) == int(code.group(1))
    # a traceback names a class with its modules, and sys.exit's text comes without a class
    named = re.fullmatch(r"(?:\w+\.)*(\w+: .+)", ended)
    error = re.escape(named.group(1)) if named else rf"[A-Z]\w*: {re.escape(ended)}"
    # nothing follows but the place, as ktverify.verify.Raised tells it
    return re.search(rf"(?:^|\s){error}(?: \(\S+:\d+\))?$", " ".join(accusation.message.split())) is not None


def _wait(command: list[str], environment: dict[str, str], log: int, time_limit: float) -> int | None:
    """The exit code of `command`, None where it was ended at its time limit, with all that it had started."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(time_limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
