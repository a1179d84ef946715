"""Check every claim of a run again without the suite: the reproducer of each case in the engine's own interpreter.

A run's claims are what one forward and backward of a case can show: one for each tensor that failed, and one for each
case that crashed the engine or got no answer, however many checks reported it. Below the run's directory each case gets
a folder. The tensors that its script saves there are judged here by the gates that failed in the suite.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import dropwhile, groupby
from pathlib import Path

import torch

from ktverify.checks.judging import wrong_forms
from ktverify.checks.problem import LiveOracle
from ktverify.checks.repro_commands import isa_name
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.process import Program, environment_of, how_it_ended
from ktverify.judge.gates import Verdict, judge
from ktverify.reproducer.bundle import ACTUAL_FILE, SCRIPT, script_of, write
from ktverify.runs.record import NOT_RUN, AccuracyRecord, AnyRecord, LatencyRecord, VerdictName
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
# the same calls without the suite's limits and gates show nothing of the other verdicts (OOM, MISTRUSTED)
SHOWN: tuple[VerdictName, ...] = ("FAIL", "CRASH", "TIMEOUT")
# a line of a check that judged a case's tensors by itself, like "  TP 2: FAIL grad_input non_finite 96, budget 0"
_LINE = re.compile(r"^\s*(?:TP (\d+): )?FAIL (\w+) (.*)$", re.MULTILINE)
_NON_FINITE = re.compile(r"^non_finite (\d+)$")
_SIGNAL = re.compile(r"\bSIG[A-Z]+\b|\bexit code \d+")


@dataclass(frozen=True)
class CaseRun:
    """Where it happened: a case's id, the tensor parallel degree, the label of the instruction set."""

    case: str
    tp: int = 1
    isa: str = ""

    def __str__(self) -> str:
        parts = (Case.parse(self.case).brief, f"TP {self.tp}" if self.tp != 1 else "", self.isa)
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Claim:
    """One claim. tensor: "" where it is not about a single one. suite: what the suite found, in few words.

    exact: the check accepts only the one right answer of integer data. message: the whole text of the suite.
    """

    where: CaseRun
    verdict: VerdictName
    tensor: str
    suite: str
    exact: bool = False
    message: str = field(default="", compare=False)


def claims(records: Iterable[AnyRecord]) -> list[Claim]:
    """All claims in the order of the run; those of one case run together, first the one about no single tensor."""
    found: dict[tuple[CaseRun, str], Claim] = {}
    for record in records:
        for claim in _of(record):
            found.setdefault((claim.where, claim.tensor), claim)
    runs = list(dict.fromkeys(where for where, _ in found))
    keys = [(where, tensor) for where in runs for tensor in ("", *ALL_TENSORS)]
    return [found[key] for key in keys if key in found]


def without_claim(records: Iterable[AnyRecord]) -> int:
    """Number of non-passing records that no claim covers."""
    bad = [record for record in records if record.verdict not in (*NOT_RUN, "PASS")]
    return sum(not any(True for _ in _of(record)) for record in bad)


def _of(record: AnyRecord) -> Iterator[Claim]:
    if record.verdict not in SHOWN or isinstance(record, LatencyRecord) or not record.case:
        return
    where = CaseRun(record.case, record.tp, record.isa)
    if record.verdict != "FAIL":
        ended = _SIGNAL.search(record.message)
        yield Claim(where, record.verdict, "", ended.group() if ended else record.verdict, message=record.message)
    elif isinstance(record, AccuracyRecord):
        yield Claim(where, "FAIL", record.tensor, _error_text(record.rel_l2, record.non_finite))
    else:
        exact = record.family == "exact"
        lines = [match.groups() for match in _LINE.finditer(record.message) if match.group(2) in ALL_TENSORS]
        for tp, tensor, text in lines:
            there = CaseRun(record.case, int(tp), record.isa) if tp else where
            yield Claim(there, "FAIL", tensor, _NON_FINITE.sub(r"\1 not finite", text.partition(", ")[0]), exact)
        if not lines:
            yield Claim(where, "FAIL", "", record.message.partition("\n")[0][:60], exact)


def _error_text(rel_l2: float, non_finite: int) -> str:
    """An error in few words: "1.00e+00", or "8192 not finite"."""
    return f"{non_finite} not finite" if non_finite else f"{rel_l2:.2e}"


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
    hosted = registry.facts(engine).hosted
    python = (hosted.check() if hosted is not None else "") or sys.executable
    found: list[Confirmation] = []
    for number, (where, members) in enumerate(groups):
        done(number, len(groups))
        found += _Reproducer(where, engine, run.directory / FOLDER, python).check(members, time_limit)
    done(len(groups), len(groups))
    return found


class _Reproducer:
    """The folder of one case run below `directory`: written, and run there. Its name: "large", "small@seed=1.tp2"."""

    def __init__(self, where: CaseRun, engine: str, directory: Path, python: str) -> None:
        self.case, self.python = Case.parse(where.case), python
        parts = (self.case.brief, f"tp{where.tp}" if where.tp != 1 else "", isa_name(where.isa))
        self.folder = directory / ".".join(filter(None, parts))
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
        from safetensors.torch import load

        saved = self.folder / ACTUAL_FILE
        saved.unlink(missing_ok=True)
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
        if not saved.is_file():
            how = f"it ended without {ACTUAL_FILE}" if code == 0 else how_it_ended(code)
            # 1 is Python's own code for every error: only the text says which
            return ScriptRun((_error_in(output) if code == 1 else "") or how, gave_up=True)
        return ScriptRun("", actual=load(saved.read_bytes()))

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
        forms = wrong_forms(self.case, {name: actual[name] for name in ALL_TENSORS if name in actual})
        for name in ALL_TENSORS:
            if name not in actual or name in forms:
                yield name, forms.get(name, "missing")
                continue
            difference = self.oracle.compare(name, actual[name])
            own, isa = self.target.strict, self.target.isa or ""
            judgement = judge(self.case, name, difference, self.oracle.rounding[name], own_engine=own, isa=isa)
            if exact and difference.mismatched:
                yield name, f"{difference.mismatched} of {difference.numel} elements differ"
            elif not exact and judgement.verdict is Verdict.FAIL:
                yield name, _error_text(difference.rel_l2, difference.non_finite)


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
