"""The known failures of an engine: a TOML file that is read by people, and what a run says about each of its entries.

    engine = "my_engine"

    [[failure]]
    check = "backward/grad_*_lora_b"    # FAMILY/TENSOR or FAMILY/TEST as `gate` prints them; * and ? stand for anything
    case = ["odd_*", "tiny"]            # the case's name; default: every case
    isa = "avx2"                        # default: every instruction set
    verdict = "FAIL"                    # default: anything that is no pass
    reason = "sizes that are no multiple of 32 are read past their end"
    link = "https://…"

The file is strict: what it covers must fail. A check that it covers and that passes is an error.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from ktverify.report.tables import base_isa
from ktverify.runs.jsonl import JsonLine
from ktverify.runs.record import NOT_RUN, AccuracyRecord, AnyRecord, LatencyRecord, VerdictName, worst_first
from ktverify.runs.store import Run
from ktverify.spec.cases import read_toml
from ktverify.system.files import write_whole

UNEXPLAINED = "not yet explained"  # the reason of an entry that was written for a run


class KnownFailure(JsonLine):
    """One entry: the records that it covers, and why they fail. See the module for the fields."""

    check: str = Field(min_length=1)
    case: tuple[str, ...] = ("*",)
    isa: str = "*"
    verdict: VerdictName | None = None
    reason: str = Field(min_length=1)
    link: str = ""

    @field_validator("case", mode="before")
    @classmethod
    def _one_or_many(cls, case: object) -> object:
        return (case,) if isinstance(case, str) else case

    def names(self, record: AnyRecord) -> bool:
        """True for a record of this check, case and instruction set, whatever its verdict."""
        return (
            _like(self.check, check_of(record))
            and any(_like(pattern, _case_of(record)) for pattern in self.case)
            and _like(self.isa, base_isa(record.isa))
        )

    def covers(self, record: AnyRecord) -> bool:
        """True for a record that fails as this entry says."""
        return _failed(record) and self.verdict in (None, record.verdict) and self.names(record)

    def __str__(self) -> str:
        parts = (self.check, *(self.case if self.case != ("*",) else ()), *((self.isa,) if self.isa != "*" else ()))
        return " ".join(parts)


@dataclass(frozen=True)
class KnownFailures:
    """A file of known failures. path: where it was read."""

    engine: str
    entries: tuple[KnownFailure, ...]
    path: str = ""

    def cover(self, record: AnyRecord) -> bool:
        """True for a record that fails as the file says."""
        return any(entry.covers(record) for entry in self.entries)


@dataclass
class Compared:
    """A run beside its known failures. known: the records that fail as the file says. wrong: a line for each entry that
    covers a check that passes, or that covers nothing. notes: entries that this run cannot show."""

    known: list[AnyRecord] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_of(record: AnyRecord) -> str:
    """`FAMILY/TENSOR`, of a timing `FAMILY/WHAT`, of all else `FAMILY/TEST` without the instruction set."""
    if isinstance(record, AccuracyRecord):
        return f"{record.family}/{record.tensor}"
    if isinstance(record, LatencyRecord):
        return f"{record.family}/{record.what}"
    name = record.name
    for isa in (f"{base_isa(record.isa)}_emulated-", f"{base_isa(record.isa)}-") if record.isa else ():
        name = name.replace(f"[{isa}", "[")
    return f"{record.family}/{name}"


def compare(known: KnownFailures, run: Run) -> Compared:
    """What `run` says about the entries of `known`. ValueError where the run is of another engine."""
    head = run.head
    if head is not None and head.engine != known.engine:
        raise ValueError(f"{known.path} has the known failures of engine {known.engine}, this run is of {head.engine}")
    found = Compared(known=[record for record in run.records if known.cover(record)])
    worst = _worst(run)
    for entry in known.entries:
        named = [record for record in worst if entry.names(record)]
        passed = [record for record in named if record.verdict == "PASS"]
        if passed:
            first = " ".join(filter(None, (check_of(passed[0]), _case_of(passed[0]), base_isa(passed[0].isa))))
            count = f", and {len(passed) - 1} more" if len(passed) > 1 else ""
            found.wrong.append(f"passes, though {known.path} says that it fails: {first}{count} (entry {entry})")
        elif not any(map(_failed, named)):
            aside = named or _may_be_elsewhere(entry, run)
            line = f"{known.path}: no record of this run is one of entry {entry}"
            (found.notes if aside else found.wrong).append(line)
    return found


def updated(known: KnownFailures | None, run: Run) -> KnownFailures:
    """The known failures of `run`: entries of `known` whose every check fails as they say, or does not run here, and
    new ones for all other failures. Entries of checks that no longer exist are left out.

    ValueError where the run did not finish, or has lost records: what it lacks would look as if it passed.
    """
    head = run.head
    if head is None or not run.finished or run.lost:
        raise ValueError(f"{run.directory.name} did not finish or has lost records: run the suites again to the end")
    old = known.entries if known is not None else ()
    worst = _worst(run)
    named = {entry: [record for record in worst if entry.names(record)] for entry in old}
    kept = [
        entry
        for entry, records in named.items()
        if all(entry.covers(record) or record.verdict in NOT_RUN for record in records)
        and (records or _may_be_elsewhere(entry, run))
    ]
    new = [record for record in worst if _failed(record) and not any(entry.covers(record) for entry in kept)]
    reasons = {id(record): entry for entry in reversed(old) for record in named[entry]}
    entries = [*kept, *_entries(new, worst, reasons)]
    return KnownFailures(head.engine, tuple(sorted(entries, key=lambda each: (each.check, each.case))))


def _worst(run: Run) -> list[AnyRecord]:
    """The worst record of each check, case and instruction set. Records that differ by seed or TP degree alone count as
    one, because an entry names neither."""
    found: dict[tuple[str, str, str], AnyRecord] = {}
    for record in worst_first(run.records):
        found.setdefault((check_of(record), _case_of(record), base_isa(record.isa)), record)
    return list(found.values())


def _may_be_elsewhere(entry: KnownFailure, run: Run) -> bool:
    """True where this machine, or what the command line left out, may be why the run has no record of an entry."""
    part = run.head is not None and run.head.selection != type(run.head.selection)()
    return part or entry.isa != "*"


def _entries(
    failed: Sequence[AnyRecord], records: Sequence[AnyRecord], reasons: dict[int, KnownFailure]
) -> Iterable[KnownFailure]:
    """As few entries as cover `failed` and no other record: one per check, verdict and set of instruction sets."""
    ran: dict[str, dict[str, set[VerdictName]]] = {}
    for record in records:
        if record.verdict not in NOT_RUN:
            ran.setdefault(check_of(record), {}).setdefault(_case_of(record), set()).add(record.verdict)
    groups: dict[tuple[str, VerdictName, str, str, str], list[str]] = {}
    for record in failed:
        check, case = check_of(record), _case_of(record)
        isa = "*" if ran[check][case] == {record.verdict} else base_isa(record.isa)
        old = reasons.get(id(record))
        why = (old.reason, old.link) if old is not None else (UNEXPLAINED, "")
        cases = groups.setdefault((check, record.verdict, isa, *why), [])
        if case not in cases:
            cases.append(case)
    for (check, verdict, isa, reason, link), cases in groups.items():
        every = isa == "*" and ran[check].keys() == set(cases)
        shown = ("*",) if every else tuple(map(_escaped, sorted(cases)))
        yield KnownFailure(check=_escaped(check), case=shown, isa=isa, verdict=verdict, reason=reason, link=link)


def read(path: str | os.PathLike[str]) -> KnownFailures:
    """Read a file of known failures. FileNotFoundError, or ValueError that names the file and what is wrong in it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no known failures at {path}: write them with `gate RUN --update-known-failures`")
    table: dict[str, Any] = read_toml(Path(path))
    unknown = sorted(table.keys() - {"engine", "failure"})
    failures = table.get("failure", [])
    if unknown or not isinstance(table.get("engine"), str) or not isinstance(failures, list):
        what = f"unknown key {unknown[0]!r}" if unknown else "no engine, or a failure that is no [[failure]]"
        raise ValueError(f"{path}: {what}; it takes engine = NAME and [[failure]] entries")
    entries = []
    for number, entry in enumerate(failures, start=1):
        try:
            entries.append(KnownFailure.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "entry"
            takes = ", ".join(KnownFailure.model_fields)
            raise ValueError(
                f"{path}: failure {number}: {where}: {first['msg'].lower()}; an entry takes {takes}"
            ) from None
    return KnownFailures(table["engine"], tuple(entries), str(path))


def write(known: KnownFailures, path: str | os.PathLike[str]) -> None:
    """Write `known` as a file that `read` takes, whole or not at all."""
    about = "# what is known to fail, for `python -m ktverify gate RUN --known-failures FILE`"
    parts = [f"{about}\nengine = {_quoted(known.engine)}\n"]
    for entry in known.entries:
        lines = ["[[failure]]", f"check = {_quoted(entry.check)}"]
        if entry.case != ("*",):
            cases = ", ".join(map(_quoted, entry.case))
            lines.append(f"case = {cases if len(entry.case) == 1 else f'[{cases}]'}")
        lines += [f"isa = {_quoted(entry.isa)}"] if entry.isa != "*" else []
        lines += [f"verdict = {_quoted(entry.verdict)}"] if entry.verdict is not None else []
        lines.append(f"reason = {_quoted(entry.reason)}")
        lines += [f"link = {_quoted(entry.link)}"] if entry.link else []
        parts.append("\n".join(lines) + "\n")
    write_whole(path, "\n".join(parts))


def _quoted(text: str) -> str:
    """A basic string of TOML: JSON's escapes are some of its own; it takes no raw DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _failed(record: AnyRecord) -> bool:
    return record.verdict not in (*NOT_RUN, "PASS")


def _case_of(record: AnyRecord) -> str:
    """The case without its seed; "" where a check has none."""
    return record.case.partition("@")[0]


def _like(pattern: str, text: str) -> bool:
    """True where `text` is `pattern`, in which * and ? stand for any characters and a backslash for what follows."""
    return _compiled(pattern).fullmatch(text) is not None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    wild = {"*": ".*", "?": "."}
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    return re.compile("".join(wild.get(part) or re.escape(part[-1]) for part in parts), re.DOTALL)


def _escaped(text: str) -> str:
    return re.sub(r"([*?\\])", r"\\\1", text)
