"""Check every claim of a run again without the suite: the reproducer of each case in the engine's own interpreter.

Input: a run. Output: a Confirmation for each claim, and below the run's directory a folder for each case, with the
output of its script. The tensors that a script saves are judged here by the gates that failed in the suite.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile, groupby
from pathlib import Path

import torch

from ktverify.checks.problem import LiveOracle
from ktverify.checks.repro_commands import isa_name
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.hosted import Hosted
from ktverify.isolation.process import Program, environment_of, how_it_ended
from ktverify.judge.gates import Verdict, judge
from ktverify.reproducer.bundle import ACTUAL_FILE, SCRIPT, load_actual, script_of, write
from ktverify.reproducer.claims import CaseRun, Claim, claims, error_text
from ktverify.runs.store import Run
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.files import write_whole

FOLDER = "confirm"
# memory corruption does not crash a process each time
TRIES = 3
# characters of a script's last line that are shown
LINE = 60
_TRACEBACK = "Traceback (most recent call last):\n"
_CODE = re.compile(r"\b(?:ended with exit code|SystemExit:) (\d+)\b")


@dataclass(frozen=True)
class Confirmation:
    """A claim, whether the script confirmed it, and what the script showed, in few words.

    ran: False where the script failed by itself, so that it shows nothing of the engine.
    """

    claim: Claim
    confirmed: bool
    script: str
    ran: bool = True


@dataclass(frozen=True)
class ScriptRun:
    """How one run of a script ended: "" where it saved its tensors, else "SIGSEGV", "no answer", exit code or error.

    gave_up: it ended by itself without tensors; `ended` is then the whole error.
    """

    ended: str
    gave_up: bool = False
    actual: dict[str, torch.Tensor] | None = None


def interpreter_of(engine: str) -> str:
    """The engine's own interpreter. ValueError where there is none."""
    factory = registry.find(engine)
    return factory.check() if isinstance(factory, Hosted) else sys.executable


def confirm(run: Run, *, time_limit: float, done: Callable[[int, int], None]) -> list[Confirmation]:
    """A confirmation for each claim of `run`. time_limit: seconds for one script; done(cases, of) after each.

    ValueError for a run whose head was lost, or whose engine brings no script.
    """
    if run.head is None:
        raise ValueError(f"{run.directory}: its head was lost, so it is unknown which engine it judged")
    engine = run.head.engine
    groups = [(where, list(members)) for where, members in groupby(claims(run.records), lambda c: c.where)]
    if not groups:
        return []
    script_of(engine)
    python = interpreter_of(engine)
    found: list[Confirmation] = []
    for number, (where, members) in enumerate(groups):
        done(number, len(groups))
        reproducer = _Reproducer(where, engine, run.directory / FOLDER / folder_name(where), python)
        found += reproducer.check(members, time_limit)
    done(len(groups), len(groups))
    return found


def folder_name(where: CaseRun) -> str:
    """A file name: "large@seed=0" -> "large", "small@seed=1" at TP 2 -> "small@seed=1.tp2"."""
    tp = f"tp{where.tp}" if where.tp != 1 else ""
    parts = (Case.parse(where.case).brief, tp, isa_name(where.isa))
    return ".".join(part for part in parts if part)


class _Reproducer:
    """The folder of one case run: written, and run there."""

    def __init__(self, where: CaseRun, engine: str, folder: Path, python: str) -> None:
        self.case, self.folder, self.python = Case.parse(where.case), folder, python
        self.target = Target(engine, isa_name(where.isa) or None, where.tp, threads=None)

    def check(self, members: list[Claim], time_limit: float) -> list[Confirmation]:
        """What the script shows of each claim; it is run again while one is unconfirmed, at most TRIES times."""
        inputs = make_inputs(self.case)
        self.oracle = LiveOracle.of(inputs)
        write(inputs, self.oracle, self.target, self.folder)
        best: list[Confirmation] = []
        for _ in range(TRIES):
            shown = self._run(time_limit)
            now = [self._confirmation(claim, shown) for claim in members]
            best = [a if a.confirmed else b for a, b in zip(best or now, now, strict=True)]
            if all(confirmation.confirmed for confirmation in best):
                break
        return best

    def _run(self, time_limit: float) -> ScriptRun:
        (self.folder / ACTUAL_FILE).unlink(missing_ok=True)
        program = Program([self.python, str(self.folder / SCRIPT)], environment_of(self.python))
        try:
            code = program.wait(time_limit)
            program.end()
            output = program.log.text()
        finally:
            program.close()
        write_whole(self.folder / "output.txt", output)
        if code is None:
            return ScriptRun("no answer")
        if code < 0:
            return ScriptRun(signal.Signals(-code).name)
        actual = load_actual(self.folder)
        if actual is None:
            how = f"it ended without {ACTUAL_FILE}" if code == 0 else how_it_ended(code)
            # 1 is Python's own code for every error: only the text says which
            return ScriptRun((_error_in(output) if code == 1 else "") or how, gave_up=True)
        return ScriptRun("", actual=actual)

    def _confirmation(self, claim: Claim, shown: ScriptRun) -> Confirmation:
        if shown.gave_up:
            confirmed = claim.verdict == "CRASH" and _same_end(claim, shown.ended)
            text = shown.ended[:LINE]
            return Confirmation(claim, confirmed, text if confirmed else f"could not be run: {text}", ran=confirmed)
        if claim.verdict == "TIMEOUT":
            return Confirmation(claim, shown.ended == "no answer", shown.ended or "answered")
        if claim.verdict == "CRASH":
            return Confirmation(claim, shown.ended not in ("", "no answer"), shown.ended or "computed")
        if shown.actual is None:
            return Confirmation(claim, False, shown.ended)
        wrong = dict(self._wrong(shown.actual, claim.exact))
        if not claim.tensor:
            return Confirmation(claim, bool(wrong), "; ".join(f"{n} {text}" for n, text in wrong.items()) or "right")
        return Confirmation(claim, claim.tensor in wrong, wrong.get(claim.tensor, "right"))

    def _wrong(self, actual: dict[str, torch.Tensor], exact: bool) -> Iterator[tuple[str, str]]:
        """(name, what is wrong) of each tensor that does not pass."""
        for name in ALL_TENSORS:
            if name not in actual:
                yield name, "missing"
                continue
            difference = self.oracle.compare(name, actual[name])
            own, isa = self.target.strict, self.target.isa or ""
            judgement = judge(self.case, name, difference, self.oracle.peer[name], own_engine=own, isa=isa)
            if exact and difference.mismatched:
                yield name, f"{difference.mismatched} of {difference.numel} elements differ"
            elif not exact and judgement.verdict is Verdict.FAIL:
                yield name, error_text(difference.rel_l2, difference.non_finite)


def _error_in(output: str) -> str:
    """The error that a script's output ends with, in one line: "ValueError: …", or the argument of sys.exit."""
    _, traced, end = output.rpartition(_TRACEBACK)
    lines = end.strip("\n").splitlines()
    error = dropwhile(lambda line: line.startswith(" "), lines) if traced else lines[-1:]
    return " ".join(" ".join(error).split())


def _same_end(claim: Claim, ended: str) -> bool:
    """True where the script ended as the suite reported: the same exit code, or the error with its whole text.

    Any other error is the script's own: it does not parse, lacks a module or a file, or calls what does not exist.
    A name without a text, like AssertionError, may be either.
    """
    if code := _CODE.fullmatch(ended):
        reported = _CODE.search(claim.message)
        return reported is not None and int(reported.group(1)) == int(code.group(1))
    # a traceback names a class with its modules, and the text of sys.exit comes without a class
    named = re.fullmatch(r"(?:\w+\.)*(\w+: .+)", ended)
    error = re.escape(named.group(1)) if named else rf"[A-Z]\w*: {re.escape(ended)}"
    # only the place may follow, as errors.EngineRaised adds it
    return re.search(rf"(?:^|\s){error}(?: \(\S+:\d+\))?$", " ".join(claim.message.split())) is not None
