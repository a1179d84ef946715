"""Group what did not pass by its cause, so that a defect that costs a hundred checks is reported once.

One group each, worst first: all records that ended the engine in the same way; the failing tensors of a case; the
failing checks of a family. records.jsonl has what is left out here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ktverify.checks.causes import PREFIX, UNKNOWN, cause_of
from ktverify.runs.record import NOT_RUN, AccuracyRecord, AnyRecord, CheckRecord, LatencyRecord, worst_first
from ktverify.runs.store import Run

WIDTH = 110
# lines of one check, and characters of its name, in the block of a family
LINES_OF_A_CHECK = 4
WIDEST_NAME = 44
# nothing is known of a tensor: the engine's process ended
ENDED: frozenset[str] = frozenset({"CRASH", "TIMEOUT", "OOM"})

_LAST_WORDS = "; last words:"
# neither the check that called, nor addresses and sizes, make two causes of one
_CALLER = re.compile(r"^(?:\w+: )?[\w.]+:[\w.]+: ")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?")


@dataclass(frozen=True)
class FailureGroup:
    """The verdict, a heading after it, lines, and the command that repeats one of them ("" where there is none)."""

    verdict: str
    where: str
    lines: tuple[str, ...]
    repro: str


def problems(run: Run) -> list[FailureGroup]:
    """What did not pass, worst first."""
    groups: dict[tuple[str, ...], list[AnyRecord]] = {}
    for record in worst_first(run.records):
        if record.verdict not in (*NOT_RUN, "PASS"):
            groups.setdefault(_key(record), []).append(record)
    causes: dict[tuple[str, ...], list[list[AnyRecord]]] = {}
    for key, members in groups.items():
        title = _suggested(members)
        causes.setdefault((*key[:2], title) if title else key, []).append(members)
    # those whose cause was not looked for say least
    return [_group(*cases) for cases in sorted(causes.values(), key=lambda cases: _suggested(cases[0]) == UNKNOWN)]


def group_text(problem: FailureGroup, most: int | None = None) -> str:
    """A group as lines: verdict and heading, at most `most` lines of what was found, how to repeat it."""
    lines = [f"{problem.verdict} {problem.where}", *(f"    {line}" for line in problem.lines[:most])]
    if most is not None and len(problem.lines) > most:
        lines.append(f"    and {len(problem.lines) - most} more lines, see accuracy.md")
    return "\n".join([*lines, f"    {problem.repro}"] if problem.repro else lines)


def problem_text(record: AnyRecord) -> str:
    """A record that did not pass as one or two lines: what it was, what was found, how to repeat it."""
    found = next((line for line in record.message.splitlines() if line.strip()), "")
    if not found.startswith(record.verdict):
        tensor = f" {record.tensor}" if isinstance(record, AccuracyRecord) else ""
        found = f"{record.verdict}{tensor} {found}".rstrip()
    text = f"{record.family}/{record.isa or '-'} {_name(record)}: {found}"
    return f"{text}\n    {record.repro}" if record.repro else text


def _name(record: AnyRecord) -> str:
    """What was checked: a case, what was timed of it, or a check's name."""
    if isinstance(record, CheckRecord):
        return record.name
    return f"{record.case} {record.what}" if isinstance(record, LatencyRecord) else record.case


def _key(record: AnyRecord) -> tuple[str, ...]:
    if record.verdict in ENDED:
        return (record.verdict, record.isa, _NUMBER.sub("#", _cause(record)[0]))
    if isinstance(record, CheckRecord):
        return (record.verdict, record.isa, record.family, "")
    if isinstance(record, LatencyRecord):
        return (record.verdict, record.isa, record.family, record.case, record.what)
    return (record.verdict, record.isa, "tensors", record.case, str(record.tp), record.source)


def _suggested(members: Sequence[AnyRecord]) -> str:
    """The cause that the diagnosis found for the tensors of a case, as "LoRA scaling"; "" if it found none.

    UNKNOWN where it did not look for one.
    """
    causes = [cause_of(record.message) for record in members if isinstance(record, AccuracyRecord)]
    title = next(filter(None, causes), "").removeprefix(PREFIX).partition(":")[0]
    if title.startswith(UNKNOWN):
        return UNKNOWN
    return "" if title.startswith(("no ", "not ")) else _NUMBER.sub("#", title)


def _group(members: list[AnyRecord], *more: list[AnyRecord]) -> FailureGroup:
    """The group of `members`; more: other cases that have the same cause."""
    if more:
        shown, cases = _group(members), [_short(records[0]) for records in more]
        text = f"{UNKNOWN} in" if _suggested(members) == UNKNOWN else "the same cause in"
        lines = [*shown.lines, *_wrapped(f"{text} {_listed(dict.fromkeys(cases))}")]
        return replace(shown, where=f"× {1 + len(more)} cases, as {shown.where}", lines=tuple(lines))
    first, times = members[0], f"× {len(members)} " if len(members) > 1 else ""
    repro = next((record.repro for record in members if record.repro), "")
    if first.verdict in ENDED:
        where, lines = times + _joined(first.isa, _cause(first)[0]), _ended(members)
    elif isinstance(first, CheckRecord):
        where, lines = times + _joined(first.family, first.isa), _checks(members)
    else:
        families = ", ".join(dict.fromkeys(record.family for record in members))
        tp = f"TP {first.tp}" if first.tp != 1 else ""
        what = first.what if isinstance(first, LatencyRecord) else ""
        where = _joined(families, first.isa, first.case, what, tp)
        lines = [line for record in members for line in _message_lines(record)]
        # of several tensors the command of the whole case, not of the first
        repro = repro.partition(" --tensor ")[0] if len(members) > 1 else repro
    return FailureGroup(first.verdict, where, tuple(lines), repro)


def _joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


def _cause(record: AnyRecord) -> tuple[str, list[str]]:
    """(how it ended, the last words) of a record whose engine returned nothing."""
    lines = _message_lines(record)
    at = next((number for number, line in enumerate(lines) if _LAST_WORDS in line), 0)
    how = lines[at] if lines else ""
    # the message of a property begins with its sentence and its case; the error's class comes before how it ended
    return _CALLER.sub("", how.removeprefix("EngineDied: ")).partition(_LAST_WORDS)[0], lines[at + 1 :]


def _ended(members: Sequence[AnyRecord]) -> list[str]:
    """The lines of records that ended in the same way: the last words once, then names by family."""
    words = [line for line in _cause(members[0])[1] if not line.startswith("pytest ")]
    families: dict[str, list[str]] = {}
    for record in members:
        name = _short(record)
        if not isinstance(record, LatencyRecord) and record.tp != 1:
            name = f"{name.removesuffix(']')} at TP {record.tp}" + ("]" if name.endswith("]") else "")
        families.setdefault(name, []).append(record.family)
    cost: dict[tuple[str, ...], list[str]] = {}
    for name, found in families.items():
        cost.setdefault(tuple(dict.fromkeys(found)), []).append(name)
    lines = [f"last words, of {_short(members[0])}:", *(f"  {line}" for line in words)] if words else []
    for sharing, names in cost.items():
        lines += _wrapped(f"{', '.join(sharing)}: {_listed(names)}")
    return lines


def _checks(members: Iterable[AnyRecord]) -> list[str]:
    """A line for each check, its name and what it found; those that found the same share one."""
    same: dict[tuple[str, ...], list[str]] = {}
    for record in members:
        name = _short(record)
        first, *others = _message_lines(record) or [""]
        # a refusal's text begins with what was tried, as its name does
        tried = name.partition("[")[2].removesuffix("]")
        same.setdefault((first.removeprefix(f"{tried}: ") if tried else first, *others), []).append(name)
    width = min(WIDEST_NAME, max(len(names[0]) for names in same.values()))
    lines: list[str] = []
    for (first, *others), names in same.items():
        if len(names) > 1:
            lines += [f"{first} ({len(names)} times):", *_wrapped(f"  {_listed(names)}")]
            continue
        shown = others if len(others) <= LINES_OF_A_CHECK else others[: LINES_OF_A_CHECK - 1]
        lines.append(f"{names[0]:{width}}  {first}")
        lines += [f"{'':{width}}    {line.strip()}" for line in shown]
        if len(others) > len(shown):
            lines.append(f"{'':{width}}    and {len(others) - len(shown)} more lines")
    return lines


def _listed(names: Iterable[str]) -> str:
    """["refused[a]", "refused[b]", "small"] -> "refused[a, b], small"."""
    tests: dict[str, list[str]] = {}
    for name in names:
        test, bracket, tried = name.partition("[")
        tests.setdefault(test, []).extend([tried.removesuffix("]")] if bracket else [])
    return ", ".join(f"{test}[{', '.join(tried)}]" if tried else test for test, tried in tests.items())


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _short(record: AnyRecord) -> str:
    """Its name without the parts that all names have: "test_refused[a shape]" -> "refused[a shape]"."""
    found = _name(record).removeprefix("test_").replace("[engine-", "[").replace("@seed=0", "")
    # the plugin cuts a name at a case's seed, and with it the bracket
    return found + "]" if found.count("[") > found.count("]") else found.removesuffix("[engine]")


def _message_lines(record: AnyRecord) -> list[str]:
    """The message without the repro command, which is printed below it."""
    return [line.rstrip() for line in record.message.splitlines() if line.strip() and line.strip() != record.repro]
