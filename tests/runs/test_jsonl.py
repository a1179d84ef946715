"""JSON lines: a line is whole or is not there; what cannot be read is named; a full disk is one line."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ktverify.bench.c2c.store import RecordFile
from ktverify.bench.layer import record as layer_record
from ktverify.cli.golden import app as golden_app
from ktverify.report import gate
from ktverify.report.tables import run_verdict
from ktverify.runs import jsonl, store
from ktverify.runs.jsonl import LineFile, append_line
from ktverify.runs.record import CheckRecord
from ktverify.system.files import ROOT, write_whole
from ktverify.training.curves import read_curve
from tests.support.command_line import call, refused, run_pytest

FULL = {errno.ENOSPC: "No space left on device; make room", errno.EDQUOT: "Disk quota exceeded; make room"}
CLOSED = {errno.EROFS: "Read-only file system; name a folder", errno.EACCES: "Permission denied; name a folder"}
Write = Callable[[Any, Any], int]


def check(name: str) -> CheckRecord:
    return CheckRecord(family="contract", engine="native", name=name, verdict="PASS", at=1.5)


def full_after(room: int, number: int = errno.ENOSPC) -> Write:
    """os.write on a disk with `room` bytes left: the last write that fits in part is short, as the kernel's are."""
    write, left = os.write, [room]

    def limited(descriptor: int, data: Any) -> int:
        if left[0] <= 0:
            raise OSError(number, os.strerror(number))
        done = write(descriptor, data[: left[0]])
        left[0] -= done
        return done

    return limited


# ---- one writer


def by_line_file(path: Path) -> Callable[[str], None]:
    file = LineFile(path)
    return lambda name: file.write(check(name))


def by_append(path: Path) -> Callable[[str], None]:
    return lambda name: append_line(path, check(name).model_dump_json())


WRITERS = {"a file of its own": by_line_file, "one file of several processes": by_append}


@pytest.mark.parametrize("number", [*FULL, *CLOSED])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_line_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, number: int
) -> None:
    """Wherever the disk becomes full, and when there is room again."""
    path = tmp_path / "lines.jsonl"
    size = len(check("0").model_dump_json()) + 1
    for room in (0, 1, size // 2, size - 1):
        path.unlink(missing_ok=True)
        write = WRITERS[writer](path)
        write("0")
        before = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full_after(room, number))
            with pytest.raises(OSError, match=re.escape(f"{path} cannot be written: {(FULL | CLOSED)[number]}")):
                write("1")
        assert path.read_bytes() == before
        write("2")
        names = jsonl.read_lines(path, lambda text: json.loads(text)["name"])
        assert names == ["0", "2"]


def test_the_kernel_may_take_a_line_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    append_line(tmp_path / "lines.jsonl", '{"text":"some words"}')
    assert jsonl.read_objects(tmp_path / "lines.jsonl") == [{"text": "some words"}]


def test_processes_that_append_to_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    program = f"""
        import sys
        from pathlib import Path
        from ktverify.runs.jsonl import append_line
        for number in range(200):
            append_line(Path({str(path)!r}), '{{"by":"' + sys.argv[1] * 5000 + '"}}')
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    writers = [subprocess.Popen([*command, name], env={**os.environ, "PYTHONPATH": str(ROOT)}) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = [row["by"] for row in jsonl.read_objects(path)]
    assert sorted(found) == sorted([name * 5000 for name in "abc"] * 200)


def test_no_other_code_appends_to_a_file() -> None:
    """The writer of jsonl.py is the only one; write_whole is for everything else."""
    words = re.compile(r"O_APPEND|open\([^)]*[\"']a[b+t]*[\"']")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ktverify").rglob("*.py")
        if words.search(path.read_text(encoding="utf-8"))
    ]
    assert found == ["ktverify/runs/jsonl.py"]


# ---- readers

ROWS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 1.0}]
LINES = [json.dumps(row).encode() for row in ROWS]


@pytest.mark.parametrize("end", [1, 5, len(LINES[2]) - 1])
def test_a_torn_last_line_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], end: int) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_bytes(LINES[0] + b"\n" + LINES[1] + b"\n" + LINES[2][:end])
    assert read_curve(path).steps == (1, 2)
    assert f"{path}, line 3 was cut off while it was written" in capsys.readouterr().err


def test_a_last_line_without_its_end_that_is_whole_counts(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_bytes(b"\n".join(LINES))
    assert read_curve(path).steps == (1, 2, 3)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a loss history": ("loss.jsonl", read_curve),
    "a bench run": (layer_record.FILE, lambda path: layer_record.read(path.parent)),
    "prompts": ("timing.jsonl", RecordFile),
}


@pytest.mark.parametrize("line", [b'{"step": 2, "los{"step": 3}', b"\xff\xfe", b"[]", b"\0\0\0"])
@pytest.mark.parametrize("what", READERS)
def test_an_unreadable_line_in_the_middle_is_named(tmp_path: Path, what: str, line: bytes) -> None:
    name, read = READERS[what]
    path = tmp_path / name
    path.write_bytes(line + b"\n" + LINES[2] + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 1 cannot be read: ")):
        read(path)


def test_a_run_with_lost_records_is_read_and_does_not_pass(tmp_path: Path) -> None:
    """The lines that an older version left on a full disk, one glued to the next: the rest of the run is there."""
    recorder = store.start_run(tmp_path, "native", "pytest suites/")
    recorder.add(check("a"))
    part = tmp_path / "records-controller.jsonl"
    glued = check("b").model_dump_json()[:40] + check("c").model_dump_json()
    part.write_text(part.read_text() + glued + "\n")
    recorder.add(check("d"))
    for run in (store.load(tmp_path), recorder.finish(0), store.load(tmp_path)):
        assert [record.name for record in run.checks] == ["a", "d"]
        assert len(run.lost) == 1
        assert run.lost[0].startswith(f"{part}, line 3 cannot be read: ")
    assert run_verdict(run)[0] is False
    assert "1 record could not be read" in run_verdict(run)[1]
    assert [line for line in gate.judge_run(run).breaks if line.startswith("A record is lost: ")]


# ---- commands


def test_a_suite_on_a_full_disk_ends_with_one_line(tmp_path: Path) -> None:
    """A plug-in makes the disk full in the middle of the run."""
    plugin = """
        import errno, os
        from ktverify.runs import jsonl
        calls, write = [], os.write
        def full(descriptor, data):
            calls.append(1)
            if len(calls) > 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)
        class Os:
            write = staticmethod(full)
            def __getattr__(self, name):
                return getattr(os, name)
        jsonl.os = Os()
    """
    (tmp_path / "full_disk.py").write_text(textwrap.dedent(plugin))
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    done = run_pytest(tmp_path / "run", "-p", "full_disk", "suites/tp_constraint", "-q", path=Path(path))
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    text = f"FAIL: the run is not whole: {tmp_path}/run/records-controller.jsonl cannot be written: No space left"
    assert text in done.stdout
    assert len(store.load(tmp_path / "run").checks) == 3
    assert call("gate", tmp_path / "run").exit_code == 1


def run_of(directory: Path) -> Path:
    recorder = store.start_run(directory, "native", "pytest suites/")
    recorder.add(check("a"))
    recorder.finish(0)
    return directory


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "report": lambda run, out: ["report", run, "--write"],
    "gate": lambda run, out: ["gate", run, "--write-baseline", "--baseline", out / "baseline.json"],
    "repro --dump": lambda run, out: ["repro", "one_token_odd", "--dump", out / "case.safetensors"],
    "bench layer": lambda run, out: ["bench", "layer", "E=2,k=1,H=32,I=32,T=1,r=1", "--out", out / "layer"],
}


@pytest.mark.parametrize("number", [*FULL, *CLOSED])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_meets_a_full_disk_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, number: int
) -> None:
    run, out = run_of(tmp_path / "run"), tmp_path / "out"
    before = sorted(path.name for path in run.iterdir())

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "write", full)
    refused(call(*COMMANDS[command](run, out)), f"cannot be written: {(FULL | CLOSED)[number]}")
    assert sorted(path.name for path in run.iterdir()) == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size and path.parent != run]


@pytest.mark.parametrize("arguments", [["list"], ["doctor"], ["--help"], ["repro", "--help"]])
def test_standard_output_on_a_full_disk(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ktverify", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: No space left on device; make room")


def test_golden_meets_a_full_disk_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    done = CliRunner().invoke(golden_app, ["regenerate", "--dir", str(tmp_path), "--only", "one_token_odd"])
    assert done.exit_code == 2
    assert re.fullmatch(r"error: .* cannot be written: No space left on device; make room.*\n", done.output)


@pytest.mark.parametrize("number", [*FULL, *CLOSED, errno.EFBIG, errno.EIO])
def test_a_whole_file_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(f"{path} cannot be written: {os.strerror(number)}")) as raised:
        write_whole(path, "new")
    assert raised.value.errno == number
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("page.html", "old")]
