"""The scoreboard: what it shows of runs, which run replaces which, and what it refuses or escapes."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ktverify.bench import record, scores
from ktverify.bench.record import EngineLine, RoundCeilingLine, TurnLine
from ktverify.report.scoreboard import MOST_BYTES, NotRunSummary, ScoredMachine, SuiteSummary, page, read, write
from ktverify.report.tables import REFUSALS
from ktverify.runs import jsonl, store
from ktverify.runs.record import AnyRecord, RunRecord
from ktverify.system.files import ROOT
from tests.support.command_line import call, ends
from tests.support.records import HEAD, MACHINE, accuracy, check
from tests.support.records import write as write_run

RECORDS: list[AnyRecord] = [
    accuracy(),
    accuracy(3e-3, tensor="grad_input", family="backward"),
    accuracy(0.5, tensor="grad_input", family="backward", case="zipf@seed=0", isa="scalar"),
    check(),
    check("FAIL", f"{REFUSALS}rank]"),
    check("UNSUPPORTED", "test_tp"),
]


def suite(tmp_path: Path, *records: AnyRecord, name: str = "20250131T081500Z", **head: Any) -> SuiteSummary:
    run = write_run(tmp_path / name, list(records or RECORDS), 1)
    assert run.head is not None
    return SuiteSummary.of(store.Run(run.directory, run.head.model_copy(update=head), run.records))


def table_rows(text: str) -> list[list[str]]:
    """The cells of the rows of all tables, without tags."""

    def plain(cell: str) -> str:
        return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", cell).split()))

    return [[plain(cell) for cell in re.findall(r"<td.*?</td>", row)] for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_the_page_has_the_numbers_of_a_run(tmp_path: Path) -> None:
    text = page([suite(tmp_path)])
    rows = table_rows(text)
    cpu = MACHINE.cpu
    assert ["native", "✗ 3 of 5", "1", "> 1000 %", "1", "–", "–", cpu] in rows
    # instruction set, then the families in the README's order
    assert ["native", "avx2", "✓ 1 of 1 60 %", "✓ 1 of 1 75 %", "–"] in rows
    assert ["native", "scalar", "–", "✗ 0 of 1 > 1000 %", "–"] in rows
    assert "FAIL backward: grad_input of zipf@seed=0: " in text
    for fact in ("0123456789ab", "pytest suites/ -n 4", "1970-01-01 00:16 UTC", "Linux 6.1", "torch 2.13.0"):
        assert fact in text


def test_every_number_leads_to_its_run(tmp_path: Path) -> None:
    summary = suite(tmp_path)
    write([summary], tmp_path / "out")
    text = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    places = set(re.findall(r'href="#([^"]+)"', text))
    assert places == {summary.name}
    assert f'id="{summary.name}"' in text
    (file,) = set(re.findall(r'href="([^#"]+)"', text))
    assert read(tmp_path / "out" / file) == summary


def test_a_newer_run_replaces_an_older_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old, new = suite(tmp_path, started=1000.0), suite(tmp_path, accuracy(), name="b", started=2000.0)
    other = suite(tmp_path, accuracy(), name="c", engine="torch_bf16")
    assert write([old, other], out) == [old, other]
    assert write([new], out) == [new, other]
    assert write([old], out) == [new, other]
    assert write([], out) == [new, other]
    assert len(list(out.glob("*.json"))) == 2


def test_a_run_replaces_the_note_that_there_is_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = suite(tmp_path)
    machine = ScoredMachine.of(MACHINE)
    absent = NotRunSummary(engine="native", command="pytest", at=5.0, machine=machine, reason="it needs AMX")
    assert write([absent], out) == [absent]
    text = (out / "index.md").read_text(encoding="utf-8")
    assert ["native", "not run here", MACHINE.cpu] in table_rows(text)
    assert "Not run here: it needs AMX" in text
    assert write([summary], out) == [summary]
    assert [path.stem for path in out.glob("*.json")] == [summary.name]
    assert write([absent], out) == [summary]  # the note is older
    # both at once: the later one counts
    later = absent.model_copy(update={"at": summary.at + 1})
    assert write([later, summary], tmp_path / "both") == [later]
    assert [path.stem for path in (tmp_path / "both").glob("*.json")] == [later.name]


def test_a_note_stands_beside_the_engine(tmp_path: Path) -> None:
    run = write_run(tmp_path / "20250131T081500Z", RECORDS, 1).directory
    out = tmp_path / "out"
    ends(call("scoreboard", run, "--note", "native=its instructions were emulated", "--out", out), 0)
    text = (out / "index.md").read_text(encoding="utf-8")
    (glance,) = [row for row in table_rows(text) if row[-1:] == [MACHINE.cpu]]
    assert glance[0] == "native its instructions were emulated"
    assert ["note", "its instructions were emulated"] in table_rows(text)
    assert "--note is about 'x', of which no RUN" in ends(call("scoreboard", run, "--note", "x=y", "--out", out), 2)


# ---- what is refused or escaped

HTML = (
    '<script src="https://example.org/x.js"></script><img src=x onerror=alert(1)>"\'&\n\n# heading\n[a](http://b) `c`'
)


@pytest.mark.parametrize(
    "field", ["engine", "command", "commit", "note", "stamp", "verdict", "case", "cpu", "name", "isa"]
)
def test_texts_of_a_run_are_shown_as_texts(tmp_path: Path, field: str) -> None:
    values = suite(tmp_path).model_dump(mode="json")
    if field in values:
        values[field] = HTML
    elif field == "cpu":
        values["machine"] |= {"cpu": HTML, "system": HTML, "isas": [HTML], "versions": {HTML: HTML}}
    else:
        values["scores"][0] |= {"family": HTML, "isa": HTML, "nearest": HTML}
        values["failures"] = [HTML]
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    summary = read(file)
    text = page([summary])
    assert "<script" not in text
    assert "<img" not in text
    # within blocks of HTML alone: no line begins as Markdown does, and no block ends early
    assert not re.search(r"^\s*(# heading|\[a\])", text, re.MULTILINE)
    assert re.fullmatch(r"[a-z0-9-]+", summary.name)


def _huge(values: dict[str, Any], value: Any) -> None:
    values["scores"][0]["verdicts"]["PASS"] = value


REFUSED: dict[str, Any] = {
    "a count as text": lambda v: _huge(v, "12"),
    "a count that is true": lambda v: _huge(v, True),
    "a count below 0": lambda v: _huge(v, -1),
    "a count with decimals": lambda v: _huge(v, 1.5),
    "a huge count": lambda v: _huge(v, 10**30),
    "a verdict that is none": lambda v: v["scores"][0]["verdicts"].update(PERFECT=1),
    "a share below 0": lambda v: v["scores"][0].update(used=-0.5),
    "a share that is NaN": lambda v: v["scores"][0].update(used="NaN"),
    "a list for a text": lambda v: v.update(engine=["native"]),
    "no engine": lambda v: v.update(engine=""),
    "a long engine": lambda v: v.update(engine="x" * 300),
    "a time that is infinite": lambda v: v.update(at="Infinity"),
    "a huge time": lambda v: v.update(at=1e300),
    "memory as a fraction": lambda v: v["machine"].update(memory_bytes=0.5),
    "an unknown field": lambda v: v.update(script="x"),
    "an unknown kind": lambda v: v.update(kind="page"),
    "no scores": lambda v: v.update(scores=[]),
    "many scores": lambda v: v.update(scores=v["scores"] * 1000),
    "many failures": lambda v: v.update(failures=["x"] * 1000),
    "a missing machine": lambda v: v.pop("machine"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_is_no_summary_is_refused(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    summary = suite(tmp_path)
    write([summary], out)
    before = (out / "index.md").read_bytes()
    values = summary.model_dump(mode="json")
    REFUSED[what](values)
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    done = call("scoreboard", file, "--out", out)
    assert "is no summary of a run: " in ends(done, 2)
    assert len(done.output.strip().splitlines()) == 1
    assert (out / "index.md").read_bytes() == before


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b" " * (MOST_BYTES + 1)]
)
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "hostile.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is no summary of a run") as refusal:
        read(file)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_summary_under_another_name_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = suite(tmp_path)
    write([summary], out)
    (out / f"{summary.name}.json").rename(out / "other.json")
    with pytest.raises(ValueError, match=f"belongs into {summary.name}.json"):
        write([], out)


@pytest.mark.parametrize(
    ("used", "shown", "bad"),
    [(1e300, "> 1000 %", True), (math.inf, "> 1000 %", True), (1.01, "101 %", True), (1.0, "100 %", False)],
)
def test_a_share_is_short_however_large(tmp_path: Path, used: float, shown: str, bad: bool) -> None:
    summary = suite(tmp_path, accuracy())
    score = summary.scores[0].model_copy(update={"used": used})
    text = page([summary.model_copy(update={"scores": (score,)})]).replace("&gt;", ">")
    assert f">{shown}</a></td>" in text
    assert (f'class="bad"><a href="#{summary.name}">{shown}' in text) == bad


def test_nan_is_beyond_every_budget(tmp_path: Path) -> None:
    summary = suite(tmp_path, accuracy(math.nan, verdict="FAIL"))
    assert summary.scores[0].used == math.inf


def test_a_run_that_did_not_finish_is_refused(tmp_path: Path) -> None:
    recorder = store.Recorder(tmp_path / "run")
    recorder.add(RunRecord(stamp="run", engine="native", machine=MACHINE))
    recorder.add(accuracy())
    assert "it did not finish" in ends(call("scoreboard", tmp_path / "run", "--out", tmp_path / "out"), 2)
    assert not (tmp_path / "out").exists()


def test_a_run_of_which_lines_are_lost_is_refused(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", RECORDS, 1).directory
    with next(directory.glob("records-*.jsonl")).open("a", encoding="utf-8") as opened:
        opened.write('{"kind": "accuracy", "engine": "<b>"}\n')
    assert "is no run for the scoreboard" in ends(call("scoreboard", directory, "--out", tmp_path / "out"), 2)


# ---- the bench, and the command


def bench_run(directory: Path, *, turns: bool = True) -> Path:
    """A run of two engines at one shape: 10 ms and 30 ms, at a limit of 5 ms."""
    work: dict[str, Any] = {f"{what}_{unit}": 1e6 for what in ("forward", "backward") for unit in ("bytes", "flops")}
    facts: dict[str, Any] = {**HEAD, "stamp": directory.name}
    place: dict[str, Any] = {"shape": "s", "run": 1, "group": 0}
    lines: list[Any] = [
        record.HeadLine(**facts, engines=("native", "torch_loop"), threads=2, rounds=6, warmup=3, runs=1, isa=""),
        record.ShapeLine(shape="s", why="", case="small@seed=0", active=4, weight_bytes=1, **work),
        EngineLine(**place, engine="native", title="native", forward="PASS", backward="PASS", about={"isa": "avx2"}),
        EngineLine(**place, engine="torch_loop", title="torch loop", forward="PASS", backward="UNSUPPORTED"),
    ]
    for number in range(6 * turns):
        at: dict[str, Any] = {**place, "round": number}
        lines += [
            TurnLine(**at, engine="native", what="forward", ns=10_000_000),
            TurnLine(**at, engine="torch_loop", what="forward", ns=30_000_000),
            RoundCeilingLine(**at, read=2e8, multiply=1e12, isa="avx2"),
        ]
    directory.mkdir(parents=True)
    jsonl.write_lines(directory / record.FILE, lines)
    return directory


def test_the_speeds_are_those_of_the_bench(tmp_path: Path) -> None:
    bench = scores.bench_summary(bench_run(tmp_path / "20250131T081500Z-bench"))
    run = suite(tmp_path, accuracy(), engine="torch_bf16")
    rows = table_rows(page([bench, run]))
    assert ["native", "s", "avx2", "10.0", "2.00", "–", "–", ""] in rows
    assert ["torch loop", "s", "–", "30.0", "6.00", "–", "–", "backward UNSUPPORTED"] in rows
    (glance,) = [row for row in rows if row[:1] == ["torch_bf16"] and len(row) == 8]
    assert glance[5:7] == ["6.00", "–"]
    assert bench.at == 1738311300.0


def test_a_bench_without_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it was stopped, and a shape has no times"):
        scores.bench_summary(bench_run(tmp_path / "20250131T081500Z-bench", turns=False))
    with pytest.raises(ValueError, match="its folder's name has to begin with a stamp"):
        scores.bench_summary(bench_run(tmp_path / "bench"))


def test_the_command_takes_runs_of_every_kind(tmp_path: Path) -> None:
    run = write_run(tmp_path / "reports" / "runs" / "20250131T081500Z", RECORDS, 1).directory
    bench = bench_run(tmp_path / "reports" / "runs" / "20250131T081600Z-bench")
    out = tmp_path / "out"
    done = call("scoreboard", run.name, bench, "--not-run", "x=no AMX", "--out", out, "--reports", tmp_path / "reports")
    assert f"{out / 'index.md'}: 3 runs" in ends(done, 0)
    before = (out / "index.md").read_bytes()
    assert "3 runs" in ends(call("scoreboard", *out.glob("suite-*.json"), "--out", out), 0)
    assert (out / "index.md").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "has no summary of a run, and no RUN is given"),
        (("--not-run", "kt_kernel"), "--not-run is 'kt_kernel'; it takes ENGINE=REASON"),
        (("--note", "kt_kernel="), "--note is 'kt_kernel='; it takes ENGINE=NOTE"),
        (("no-such-run",), "no run"),
    ],
)
def test_the_command_refuses(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    assert text in ends(call("scoreboard", *arguments, "--out", tmp_path / "out", "--reports", tmp_path), 2)


def test_the_committed_page_is_made_of_the_committed_summaries(tmp_path: Path) -> None:
    committed = ROOT / "docs" / "scoreboard"
    again = shutil.copytree(committed, tmp_path / "again")
    shown = write([], again)
    assert (again / "index.md").read_text(encoding="utf-8") == (committed / "index.md").read_text(encoding="utf-8")
    judged = {summary.engine for summary in shown}
    assert judged >= {"native", "torch_bf16", "torch_grouped_mm", "transformers_experts", "kt_kernel", "vllm_cpu"}
