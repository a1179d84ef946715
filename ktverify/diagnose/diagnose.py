"""Diagnose an engine on a case: the tensors first, then which values go stale, then the checks of the contract.

The engine is called in processes that may die (asking.py), and what it does instead of computing is a finding too. All
findings are kept, best first; a defect that several checks show is one of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from ktverify.checks.causes import Cause
from ktverify.checks.check import Check
from ktverify.checks.judging import NUMBERS
from ktverify.checks.registry import find, of_any_engine
from ktverify.checks.target import Target
from ktverify.diagnose.asked_check import Shown, of_fault, shown_by
from ktverify.diagnose.asking import Asking, Fault, Given, TimeUpError
from ktverify.diagnose.evidence import Evidence, Explanation, Tensors, same_words, stated
from ktverify.diagnose.search import Diagnosis, Family, explain, proved, reduced
from ktverify.diagnose.stale import stale_values
from ktverify.errors import EngineDied
from ktverify.spec.cases import Case, flops
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS

SURE = 0.95  # share of the error above which an explanation needs no further calls
_LONG_S = 20.0  # seconds without an answer that are a finding where the time is up; small checks take a few
_SMALL = 10**8  # floating-point operations of forward and backward, up to which a case is quick
# gates of numbers: where the case's own numbers are wrong, they show nothing new
_OF_NUMBERS = frozenset((*NUMBERS, "loss", "tp"))
# One defect can fail several checks. A check that suggests the right cause of a defect runs before those that suggest a
# more general one; what takes long (trainings, new processes) runs last. Ties keep the order of the registry.
_FIRST = (
    "behaviour/nothing_is_written*",
    "behaviour/repeats",
    "behaviour/threads",
    "behaviour/odd_addresses",
    "behaviour/strides",
    "behaviour/idle_experts",
    "behaviour/varying_tokens",
    "behaviour/reload",
    "behaviour/two_layers",
    "behaviour/outstanding_forwards",
    "training/update*",
    "processes/update_while_forward_waits",
    "behaviour/*",
    "tp/*",
    "refusals/*",
    "tp_constraint/*",
    "edge/*",
    "exact/*",
)
_LAST = ("training/*", "processes/*")


def _silent(text: str) -> None:
    """Show no progress."""


def diagnose(
    case: Case,
    target: Target,
    *,
    tensors: Sequence[str] | None = None,
    inputs: Inputs | None = None,
    actual: Tensors | None = None,
    run_checks: bool = True,
    first_only: bool = False,
    seconds: float = 20.0,
    asking: Asking | None = None,
    say: Callable[[str], None] = _silent,
) -> Diagnosis:
    """Find what is wrong with `target` on `case`; with `run_checks`, also what the case does not show.

    tensors: examine only these. actual: ALL_TENSORS of the case, if the caller has them. run_checks=False makes no call
    beyond the case's own. first_only: the first finding is enough. seconds: after this time no further hypothesis or
    check is begun. asking: the processes for the engine's calls. say: gets what is done next, in few words.
    Raises what the import of the engine raises; all else that it does is a finding.
    """
    with contextlib.ExitStack() as stack:
        asking = asking or stack.enter_context(Asking())
        asking.until = float("inf")
        inputs, note = reduced(make_inputs(case) if inputs is None else inputs)
        strict, fault = None, None
        if actual is None or note:
            say(f"forward and backward of {case.id}")
            given: Given = asking.compute(target, case)
            actual, strict, fault = given.actual, given.strict, given.fault
        until = time.monotonic() + seconds
        wanted = {name: tensor for name, tensor in actual.items() if name in (tensors or ALL_TENSORS)}
        say("hypotheses about its tensors")
        # the checks get the other half of the time
        share = seconds / 2 if run_checks else seconds
        diagnosis = explain(Evidence.of(inputs, wanted, target, strict=strict, seconds=share))
        diagnosis.computed = len(actual)
        findings = _Findings(diagnosis, fault)
        solved = bool(diagnosis.explanations) and all(each.share > SURE for each in diagnosis.explanations)
        notes = [note] if note else []
        if run_checks and not (first_only and solved):
            asking.until = until
            if not first_only and not fault:
                _prove(findings, case, target, asking, until)
            # the checks of the registry have cases and tensor parallel degrees of their own
            near = _on_case(case, target.tp) if (diagnosis.failing and not solved) or target.tp != 1 else []
            far = [] if first_only and diagnosis.failing else quick()
            notes += _ask(findings, near, far, target, asking, first_only, say)
        diagnosis.explanations = findings.ranked()
        diagnosis.note = "; ".join(notes)
        return diagnosis


@dataclass
class _Findings:
    """The findings by where they come from. diagnosis: that of the case's tensors, which gets the rest."""

    diagnosis: Diagnosis
    fault: Fault | None
    # what each finding is about, to see that another check shows the same
    near: list[tuple[Explanation, Explanation | None]] = field(default_factory=list)
    far: list[tuple[Explanation, Explanation | None]] = field(default_factory=list)
    own: list[tuple[Explanation, Explanation | None]] = field(default_factory=list)
    died: list[tuple[Explanation, Explanation | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own = [(each, each) for each in self.diagnosis.explanations]
        if self.fault is None:
            return
        if self.fault.verdict == "UNSUPPORTED":
            self.diagnosis.unsupported[self.fault.text] = [self.diagnosis.case.id]
            return
        proof = f"this call of {self.diagnosis.case.id} shows it"
        found = stated(Cause.CRASH, self.fault.text, *self.fault.words, proof=proof)
        self.died = [(found, found)]

    def ranked(self) -> list[Explanation]:
        """All, best first: what the engine did, the case's tensors, the checks on the case, the other checks."""
        clear = [pair for pair in self.own if pair[0].share > SURE]
        rest = [pair for pair in self.own if pair[0].share <= SURE]
        return [finding for finding, _ in (*self.died, *clear, *self.near, *rest, *self.far)]

    def families(self) -> list[Family]:
        """The families of the hypotheses that explain a call so far."""
        return [finding.family for finding in self.ranked() if finding.family is not None and finding.share > SURE]

    def add(self, check: str, shown: Shown, near: bool) -> bool:
        """Take over what a check shows; False where it is nothing new."""
        if shown.fault is not None and shown.fault.verdict == "UNSUPPORTED":
            self.diagnosis.unsupported.setdefault(shown.fault.text, []).append(check)
            return False
        for kept in (self.died, self.own, self.near, self.far):
            for place, (finding, about) in enumerate(kept):
                if self._same(check, finding, about, shown):
                    kept[place] = replace(finding, also=(*finding.also, check)), about
                    return False
        if self._follows(shown):
            return False
        (self.near if near else self.far).append((shown.finding, shown.about))
        return True

    def unknown(self, found: Sequence[Explanation]) -> list[Explanation]:
        """Those that say something else than what is known."""
        known = [about.text for kept in (self.died, self.own, self.near, self.far) for _, about in kept if about]
        return [each for each in found if not any(same_words(each.text, text) for text in known)]

    def _same(self, check: str, finding: Explanation, about: Explanation | None, shown: Shown) -> bool:
        if shown.fault is not None:
            return about is not None and same_words(about.text, shown.fault.text)
        if shown.about is not None and about is not None and about.says(shown.about):
            return True
        alike = finding.cause is shown.finding.cause and finding.cause is not Cause.OTHER
        # the bits after new weights show that something is stale, but not what
        alike = alike or (check == "behaviour/reload" and finding.cause is Cause.STALE_LORA)
        # a check only suggests a cause, and a proved finding of this cause is more than that
        return alike and (bool(finding.proof) or (shown.about is None and about is None))

    def _follows(self, shown: Shown) -> bool:
        """True where the wrong numbers of the case explain it."""
        return bool(self.diagnosis.failing) and shown.about is None and bool(shown.gates) and shown.gates <= _OF_NUMBERS


def _prove(findings: _Findings, case: Case, target: Target, asking: Asking, until: float) -> None:
    """Test the findings on the engine's tensors for new inputs."""
    parts = [each for each, _ in findings.own]
    if not any(each.family is not None and each.left >= 0 for each in parts):
        return
    other = case.with_seed(case.seed + 1)
    with contextlib.suppress(EngineDied, TimeUpError):
        given = asking.compute(target, other)
        inputs, _ = reduced(make_inputs(other))
        left = max(0.0, until - time.monotonic())
        evidence = Evidence.of(inputs, given.actual, target, strict=given.strict, seconds=left)
        parts = proved(parts, evidence, f"new inputs (seed {other.seed})")
        findings.own = [(each, each) for each in parts]


def _ask(
    findings: _Findings,
    near: Sequence[Check],
    far: Sequence[Check],
    target: Target,
    asking: Asking,
    first_only: bool,
    say: Callable[[str], None],
) -> list[str]:
    """Run the checks and what finds stale values; notes on what was left out."""
    asked = [*near, *far]
    for number, check in enumerate(asked):
        try:
            if number == len(near):
                say("which tensors go stale")
                found = findings.unknown(_stale(target, asking))
                findings.far += [(each, each) for each in found]
                if found and first_only:
                    return []
            say(f"check {number + 1} of {len(asked)}: {check.id}")
            shown = _shown(check, target, asking, findings.families())
        except TimeUpError as up:
            if up.seconds >= _LONG_S:
                findings.far.append((_unanswered(up), None))
            return [f"the time was up after {number} of {len(asked)} checks"]
        findings.diagnosis.tried += 1
        if shown is not None and findings.add(check.id, shown, number < len(near)) and first_only:
            return []
    return []


def _unanswered(up: TimeUpError) -> Explanation:
    """The finding for an engine that had been in one call for long when the time was up."""
    text = f"the engine may hang in {up.call}: it had not answered for {up.seconds:.0f} s when the time was up"
    return replace(stated(Cause.CRASH, text, "a --time-limit below --seconds shows whether it does"), complete=False)


def _stale(target: Target, asking: Asking) -> list[Explanation]:
    try:
        found: list[Explanation] = asking.call(stale_values, target, fresh=True)
    except EngineDied as died:
        fault = Fault.of(died)
        return [stated(Cause.CRASH, fault.text, *fault.words, proof="a call that looks for stale values shows it")]
    return found


def _shown(check: Check, target: Target, asking: Asking, first: Sequence[Family]) -> Shown | None:
    try:
        shown: Shown | None = asking.call(shown_by, check, target, first, fresh=check.fresh_process)
    except EngineDied as died:
        return of_fault(check, Fault.of(died))
    return shown


def quick() -> list[Check]:
    """The checks with small cases that any engine can be asked, in the order that distinguishes causes best."""
    small = [each for each in of_any_engine() if each.case is None or flops(each.case, backward=True) <= _SMALL]
    return sorted(small, key=_place)


def _place(check: Check) -> tuple[int, str]:
    for place, pattern in enumerate(_FIRST):
        if fnmatchcase(check.id, pattern):
            return place, ""
    # forward and backward of a case share its inputs and its oracle
    last = any(fnmatchcase(check.id, pattern) for pattern in _LAST)
    return (len(_FIRST) + 1, "") if last else (len(_FIRST), check.name)


def _on_case(case: Case, tp: int) -> list[Check]:
    """The checks of what can make `case` fail although every formula is right: writes, repeats, threads, addresses."""
    names = ("nothing_is_written", "repeats", "threads", "odd_addresses")
    return [replace(find(f"behaviour/{name}"), case=case, arguments={}, tp=(tp,)) for name in names]
