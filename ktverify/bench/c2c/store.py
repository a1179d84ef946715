"""The file of records, NAME.jsonl: it grows by whole lines, and a killed run is resumed after the last of them.

NAME.run.json beside it contains the settings, so that records with other settings cannot get into the same file. Only
one process at a time can write a file. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ktverify.bench.c2c.record import IDENTITY, C2cSettings, PromptRecord, RunInfo, Sitting
from ktverify.bench.timed_run import busy
from ktverify.runs.jsonl import LineFile, read_lines, write_lines
from ktverify.system.files import write_whole

SUFFIX = ".jsonl"


def beside(path: Path, ending: str) -> Path:
    """NAME + ending for NAME.jsonl. ValueError for a path of another ending."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} does not end in {SUFFIX}; it takes a file of JSON lines")
    return path.with_name(path.name.removesuffix(SUFFIX) + ending)


def info_path(path: Path) -> Path:
    return beside(path, ".run.json")


class RecordFile(LineFile):
    """Appends records to a new or existing file; removes a last line that was cut off.

    done: the records that are there already. BlockingIOError if another process writes the file.
    """

    def __init__(self, path: Path) -> None:
        self._made = not path.exists()
        super().__init__(path, resume=True)
        try:
            self.done = read_records(path)
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Close the file, and remove it if this object made it and it is empty."""
        if self._made and self.path.stat().st_size == 0:
            self.path.unlink(missing_ok=True)
        super().close()


def read_records(path: Path) -> list[PromptRecord]:
    """The whole records of a file. ValueError for a line that is no record, or for a missing file."""
    try:
        return read_lines(path, PromptRecord.model_validate_json)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_info(path: Path) -> RunInfo:
    """The info file of the records at `path`. ValueError if it is missing or wrong."""
    file = info_path(path)
    try:
        return RunInfo.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, so it is unknown how {path} was made; name another file") from None
    except ValidationError as error:
        raise ValueError(f"{file} is no file of `bench c2c`: {error.errors()[0]['msg']}") from None


def describe(projectors: Path | None) -> str:
    """The value of C2cSettings.projectors for a file: name and SHA-256. ValueError if it cannot be read."""
    if projectors is None:
        return IDENTITY
    try:
        return f"{projectors.name} {hashlib.sha256(projectors.read_bytes()).hexdigest()}"
    except OSError as error:
        raise ValueError(f"--projectors {projectors} cannot be read: {error}") from None


def notes(paths: Sequence[Path]) -> list[str]:
    """A line for each combination of models, settings, machine and versions; first, a note about other programs' load.

    A file without an info file has no line.
    """
    return [
        *filter(None, [warning(paths)]),
        *dict.fromkeys(_note(info.settings, sitting) for info in _infos(paths) for sitting in info.sittings),
    ]


def warning(paths: Sequence[Path]) -> str:
    """A note if other programs used so much of the processors that times mean little, else ""."""
    return busy(sitting.others for info in _infos(paths) for sitting in info.sittings if sitting.others is not None)


def _infos(paths: Sequence[Path]) -> list[RunInfo]:
    return [read_info(path) for path in paths if info_path(path).is_file()]


def _note(settings: C2cSettings, sitting: Sitting) -> str:
    where = f"{sitting.machine.cpu}, threads {sitting.threads}" if settings.device == "cpu" else settings.device
    versions = f"torch {sitting.machine.versions.get('torch', '?')}, transformers {sitting.transformers}"
    pair = f"{settings.base_model} taught by {settings.teacher_model}"
    return f"{pair}, {settings.projectors.partition(' ')[0]}, {settings.dtype}, {where}; {versions}"


def write_info(path: Path, settings: C2cSettings, sittings: Sequence[Sitting]) -> None:
    write_whole(info_path(path), RunInfo(settings=settings, sittings=tuple(sittings)).model_dump_json(indent=1) + "\n")


def check_resumable(path: Path, settings: C2cSettings, done: Sequence[PromptRecord], prompts: Sequence[str]) -> None:
    """Raise ValueError unless a run with `settings` over `prompts` begins with the records `done`."""
    if not done:
        return
    apart = read_info(path).settings.differences(settings)
    if apart:
        raise ValueError(f"{path} was made with other settings ({', '.join(apart)}); name another --output")
    for record, wanted, prompt in zip(done, settings.ids, prompts, strict=False):
        if record.id != wanted or record.prompt != prompt:
            raise ValueError(f"{path}: the record of id {record.id} is not of prompt {wanted} of this data set")
    if len(done) > len(settings.ids):
        raise ValueError(f"{path} has {len(done)} records, this run makes {len(settings.ids)}; name another --output")


def merge(paths: Sequence[Path], output: Path) -> list[PromptRecord]:
    """Join the files of shards or ranges in the order of ids, and write them to `output` with an info file.

    ValueError unless their settings belong to one run, and every id of their whole range occurs once.
    """
    info_path(output)
    if output.exists():
        raise ValueError(f"{output} exists: remove it or name another --output")
    infos = [read_info(path) for path in paths]
    first = infos[0].settings
    for path, info in zip(paths, infos, strict=True):
        apart = first.differences(info.settings, ("start", "count", "shard"))
        if apart:
            raise ValueError(f"{paths[0]} and {path} are not of one run: {', '.join(apart)}")
    found: dict[int, PromptRecord] = {}
    for path in paths:
        for record in read_records(path):
            if record.id in found:
                raise ValueError(f"{path}: id {record.id} is in another of the files as well")
            found[record.id] = record
    # of the ranges, not of the given shards: a missing shard may have the first or the last ids
    ranges = [range(info.settings.start, info.settings.start + info.settings.count) for info in infos]
    span = range(min(one.start for one in ranges), max(one.stop for one in ranges))
    missing = [number for number in span if number not in found]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {len(span)} ids are in no file: {shown}; finish those shards or name them too"
        )
    joined = [found[number] for number in span]
    whole = first.model_copy(update={"start": span.start, "count": len(span), "shard": (1, 1)})
    write_info(output, whole, [sitting for info in infos for sitting in info.sittings])
    write_lines(output, joined)
    return joined
