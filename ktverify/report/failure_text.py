"""The text that pytest prints of a failed test: the verdict and what was found, without the source of the checks."""

from __future__ import annotations

from ktverify.checks.accuracy import verdict_of
from ktverify.errors import EngineFailed, GateFailed, NotPassed, PropertyFailed, RemoteError
from ktverify.isolation.child import raised_by_the_engine
from ktverify.system.files import PACKAGE, ROOT, SUITES
from ktverify.system.printable import shown

_FRAME = '  File "'
# frames of the checks; an engine's own, also the native one's, are shown
_OURS = tuple(f"{_FRAME}{place}/" for place in (SUITES, ROOT / "tests", PACKAGE / "checks", PACKAGE / "isolation"))


def text_of(raised: BaseException, repeat: str) -> str:
    """`_text_of`, fit for a terminal: what an engine says may contain anything."""
    return shown(_text_of(raised, repeat))


def _text_of(raised: BaseException, repeat: str) -> str:
    """The text of what a test raised, or "" where it may be a bug of the checks: then pytest prints its own traceback.

    repeat: the command that repeats the test, added where the text has no command of its own.
    """
    if isinstance(raised, (NotPassed, PropertyFailed)):
        return str(raised)
    if isinstance(raised, GateFailed):
        return f"FAIL {raised}\n{repeat}"
    if isinstance(raised, EngineFailed):
        verdict, message = verdict_of(raised)
        return f"{verdict} {message.removeprefix(f'{verdict} ')}\n{repeat}"
    if raised_by_the_engine(raised):
        trace = str(raised.__cause__ or raised).splitlines()
        frames = [line for line in trace if line.startswith(_FRAME)]
        if frames and not frames[-1].startswith(_OURS):
            what = trace[-1] if isinstance(raised, RemoteError) else f"{type(raised).__name__}: {raised}"
            return "\n".join([f"CRASH {what}", *_without_ours(trace), repeat])
    return ""


def _without_ours(trace: list[str]) -> list[str]:
    """A traceback's lines without the frames of the checks."""
    kept, ours = [], False
    for line in trace:
        if line.startswith(_FRAME) or not line.startswith(" "):
            ours = line.startswith(_OURS)
        if not ours:
            kept.append(line)
    return kept
