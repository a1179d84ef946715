"""Runs on disk: `reports/runs/<stamp>/records.jsonl`.

Every process appends to a part file of its own, so that a killed one loses at most one line. The controller merges the
parts at the end. `load` reads merged runs and unfinished ones.
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ktverify.runs.jsonl import append_line, read_lines, write_lines
from ktverify.runs.record import AccuracyRecord, AnyRecord, CheckRecord, LatencyRecord, RunRecord, Selection, parse_line
from ktverify.system.files import RUN_SUITES, reports_dir, write_whole

MERGED = "records.jsonl"
_HEAD = b'"kind":"run"'  # quotes in a text are escaped, so that only a head contains this
# files that other commands write into a run's folder -> what shows them
_SHOWN_BY = {
    "bench.jsonl": "bench shapes --show",
    "layer.jsonl": "bench layer --show",
    "profile.jsonl": "profile --show",
    "transformer.jsonl": "bench transformer --show",
}
_STAMP = re.compile(r"\d{8}T\d{6}Z(-\d+)?$")


@dataclass(frozen=True)
class Run:
    """A run as read back: its head (None if it was lost), its records in the order in which they were made, a sentence
    for each line that could not be read, the names of the part files that it was read from."""

    directory: Path
    head: RunRecord | None
    records: tuple[AnyRecord, ...]
    lost: tuple[str, ...] = ()
    parts_read: tuple[str, ...] = ()

    @property
    def accuracy(self) -> list[AccuracyRecord]:
        return [record for record in self.records if isinstance(record, AccuracyRecord)]

    @property
    def latency(self) -> list[LatencyRecord]:
        return [record for record in self.records if isinstance(record, LatencyRecord)]

    @property
    def checks(self) -> list[CheckRecord]:
        return [record for record in self.records if isinstance(record, CheckRecord)]

    @property
    def finished(self) -> bool:
        return self.head is not None and self.head.finished is not None


class Recorder:
    """Adds records to a run directory. One per process; `worker` names its part file (default: xdist's name)."""

    def __init__(self, run_dir: str | os.PathLike[str], worker: str | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.worker = worker if worker is not None else os.environ.get("PYTEST_XDIST_WORKER", "main")
        self._part = self._part_of(self.worker)
        # what this process wrote: the engine under test may write there as well
        self.lines: list[str] = []

    def _part_of(self, worker: str) -> Path:
        return self.run_dir / f"records-{worker}.jsonl"

    def add(self, record: RunRecord | AnyRecord) -> None:
        """Append one record. When this returns the kernel has it, so the process may die right after."""
        if not record.worker and not isinstance(record, RunRecord):
            record = record.model_copy(update={"worker": self.worker})
        line = record.model_dump_json()
        append_line(self._part, line)
        self.lines.append(line)

    def restore(self, lines: Mapping[str, Sequence[str]], silent: Collection[str] = ()) -> None:
        """Write the parts of the run again as its processes remember them, and remove all others.

        For the controller, before `finish`. lines: by worker. silent: the workers that ended without a word, whose
        parts stay as they are.
        """
        known = {self.worker: self.lines, **lines}
        kept = {self._part_of(worker) for worker in silent}
        for path in {*self.run_dir.glob("records*.jsonl")} - kept:
            path.unlink()
        for worker, mine in known.items():
            if mine:
                write_whole(self._part_of(worker), "".join(f"{line}\n" for line in mine))

    def finish(self, exit_status: int | None = None) -> Run:
        """Merge all parts into records.jsonl and return the run; the caller writes the pages.

        For the controller, once, after all workers have ended. The head gets its end time and `exit_status`.
        """
        run = load(self.run_dir)
        if run.head is not None:
            ended = {"finished": time.time(), "exit_status": exit_status, "lost": run.lost}
            run = replace(run, head=run.head.model_copy(update=ended))
        write_records(run)
        for part in run.parts_read:
            (self.run_dir / part).unlink(missing_ok=True)
        return run


def write_records(run: Run) -> None:
    """Write records.jsonl of `run` into its directory."""
    write_lines(run.directory / MERGED, ((run.head,) if run.head else ()) + run.records)


def load(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run, merged or not. Lines that were cut off or are no records are left out and named.

    Raises FileNotFoundError if there are no records.
    """
    directory = Path(run_dir)
    merged = [directory / MERGED] if (directory / MERGED).is_file() else []
    parts = sorted(directory.glob("records-*.jsonl"))
    if not merged and not parts:
        raise FileNotFoundError(
            _of_another_kind(directory) or f"no run in {directory}: it has no records of the suites"
        )
    heads: list[RunRecord] = []
    # a controller that is killed between merging and removing the parts leaves lines twice: equal lines are one record
    results: dict[str, AnyRecord] = {}
    lost: list[str] = []
    for path in merged + parts:
        for line, record in read_lines(path, lambda text: (text, parse_line(text)), lost=lost):
            if isinstance(record, RunRecord):
                heads.append(record)
            else:
                results.setdefault(line, record)
    ordered = tuple(sorted(results.values(), key=lambda record: record.at))
    head = max(heads, key=lambda record: record.finished or 0.0, default=None)
    lost = [*(head.lost if head is not None else ()), *lost]
    return Run(directory, head, ordered, tuple(dict.fromkeys(lost)), tuple(path.name for path in parts))


def _is_torn(line: bytes) -> bool:
    """True for a line whose end is missing because its process was killed while it wrote."""
    return not line.rstrip().endswith(b"}")


def find_run(name: str = "latest", reports: str | os.PathLike[str] | None = None) -> Path:
    """The directory of a run: "latest", a stamp (or its beginning), or a path. Raises FileNotFoundError.

    The latest is the newest that has a result; a run that was stopped before its first one is passed over.
    """
    if name != "latest" and (Path(name).is_dir() or os.sep in name):
        if not Path(name).is_dir():
            raise FileNotFoundError(f"no run at {name}: there is no such directory")
        return Path(name)
    runs = (Path(reports) if reports is not None else reports_dir()) / "runs"
    stamped = sorted(path for path in runs.glob("*") if _STAMP.fullmatch(path.name))
    known = [path for path in stamped if any(path.glob("records*.jsonl"))]
    if name != "latest" and not any(path.name.startswith(name) for path in known):
        timed = [text for path in sorted(runs.glob(f"{glob.escape(name)}*")) if (text := _of_another_kind(path))]
        if timed:
            raise FileNotFoundError(timed[-1])
    if not known:
        raise FileNotFoundError(f"no run in {runs}: make one with {RUN_SUITES}")
    if name == "latest":
        found = next((path for path in reversed(known) if _has_a_result(path)), None)
        if found is None:
            raise FileNotFoundError(f"no run in {runs} has a record: make one with {RUN_SUITES}")
        return found
    matching = [path for path in known if path.name.startswith(name)]
    if not matching:
        newest = ", ".join(path.name for path in reversed(known[-5:]))
        raise FileNotFoundError(f"no run named {name!r} in {runs}; the newest are {newest}")
    return matching[-1]


def _of_another_kind(directory: Path) -> str:
    """What a folder without records of the suites is, and how to look at it, if another command wrote it; else ""."""
    for file, command in _SHOWN_BY.items():
        if (directory / file).is_file():
            return f"{directory} is no run of the suites; look at it by `python -m ktverify {command} {directory}`"
    return ""


def _has_a_result(directory: Path) -> bool:
    """True where the run in `directory` has more than its head. Reads no further than the first result."""
    for path in directory.glob("records*.jsonl"):
        with path.open("rb") as lines:
            if any(line.strip() and not _is_torn(line) and _HEAD not in line for line in lines):
                return True
    return False


def start_run(
    run_dir: str | os.PathLike[str],
    engine: str,
    command: str,
    workers: int = 1,
    selection: Selection | None = None,
    contract: str = "",
) -> Recorder:
    """Start a run and return the controller's recorder. The head, with the facts of this machine, is written at once.

    contract: the versions of docs/contract.md that it is judged by and written for, in words.
    Raises FileExistsError if `run_dir` already has a run: two runs in one directory would be read as one.
    """
    from ktverify.system import machine

    if any(Path(run_dir).glob("records*.jsonl")):
        raise FileExistsError(f"{run_dir} already holds a run; name a directory of its own for this one")
    recorder = Recorder(run_dir, worker="controller")
    facts: dict[str, Any] = {"commit": machine.git_commit(), "machine": machine.read_machine(), "workers": workers}
    facts |= {"selection": selection or Selection(), "contract": contract}
    recorder.add(RunRecord(stamp=Path(run_dir).name, engine=engine, command=command, **facts))
    return recorder
