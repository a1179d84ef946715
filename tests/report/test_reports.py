"""Records, runs on disk and pages: the pages show what was recorded."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ktverify.report import console, gate, pages, plots, style, tables
from ktverify.report.grid import Grid
from ktverify.runs import store
from ktverify.runs.record import VERDICT_ORDER, AccuracyRecord, AnyRecord, GateRecord, parse_line, worst_first
from ktverify.spec.names import ALL_TENSORS
from ktverify.system.files import ROOT
from tests.support.pages import Page, markdown_rows
from tests.support.records import accuracy, check, latency, write

# ---- records


@pytest.mark.parametrize("value", [0.0, 2.43e-3, math.inf, math.nan])
def test_records_survive_their_json_line(value: float) -> None:
    record = accuracy(verdict="PASS").model_copy(update={"rel_l2": value})
    back = parse_line(record.model_dump_json())
    assert isinstance(back, AccuracyRecord)
    assert back.rel_l2 == value or (math.isnan(back.rel_l2) and math.isnan(value))
    assert back.model_copy(update={"rel_l2": 1.0}) == record.model_copy(update={"rel_l2": 1.0})
    # any reader of JSON takes the line, also one that knows no NaN
    json.loads(record.model_dump_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_line_that_is_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match="not a record"):
        parse_line('{"kind": "accuracy", "verdict": "GOOD"}')
    with pytest.raises(ValueError, match="verdict is PASS although gate rel_l2 is not"):
        AccuracyRecord.model_validate({**accuracy(1.0).model_dump(), "verdict": "PASS"})


def test_deciding_gate_is_the_failed_one_and_never_how_alive_the_inputs_are() -> None:
    passed = GateRecord(gate="mean_rel", value=4.9, budget=5, used=0.98, verdict="PASS")
    alive = GateRecord(gate="trust", value=0.5, budget=0.5, used=1.0, verdict="PASS")
    failed = GateRecord(gate="stray", value=1, budget=0, used=0.1, verdict="FAIL")
    base = accuracy(2e-3)
    assert base.model_copy(update={"gates": (passed, alive)}).deciding_gate == passed
    assert base.model_copy(update={"gates": (passed, failed, alive)}).deciding_gate == failed


def test_worst_first() -> None:
    errors = [accuracy(rel_l2) for rel_l2 in (1e-3, 3.9e-3, 5e-3, 9e-3)]
    records: list[AnyRecord] = [accuracy(verdict="SKIP"), *errors, check("CRASH"), accuracy(math.nan, verdict="FAIL")]
    ordered = worst_first(records)
    assert [r.verdict for r in ordered] == ["CRASH", "FAIL", "FAIL", "FAIL", "PASS", "PASS", "SKIP"]
    shown = [r.rel_l2 for r in ordered if isinstance(r, AccuracyRecord)]
    assert math.isnan(shown[0])
    assert shown[1:5] == [9e-3, 5e-3, 3.9e-3, 1e-3]


# ---- runs on disk


def test_parts_of_all_workers_are_merged(tmp_path: Path) -> None:
    directory = tmp_path / "20250101T000000Z"
    controller = store.start_run(directory, engine="native", command="pytest", workers=3)
    for worker in range(3):
        recorder = store.Recorder(directory, worker=f"gw{worker}")
        for tensor in ALL_TENSORS:
            recorder.add(accuracy(tensor=tensor, case=f"case{worker}@seed=0"))
    run = controller.finish(0)
    assert len(run.records) == 3 * len(ALL_TENSORS)
    assert {record.worker for record in run.records} == {"gw0", "gw1", "gw2"}
    assert run.finished
    assert [path.name for path in directory.iterdir()] == ["records.jsonl"]
    again = store.load(directory)
    assert again.records == run.records
    assert again.head == run.head
    with pytest.raises(FileExistsError, match="already holds a run"):
        store.start_run(directory, engine="native", command="pytest")


def test_the_part_of_a_killed_worker_is_still_read(tmp_path: Path) -> None:
    directory = tmp_path / "20250101T000000Z"
    store.start_run(directory, engine="native", command="pytest")
    program = f"""
        import os, signal, sys
        from ktverify.runs.record import CheckRecord
        from ktverify.runs.store import Recorder
        recorder = Recorder({str(directory)!r}, worker="gw1")
        for number in range(5):
            recorder.add(CheckRecord(family="contract", engine="native", name=str(number), verdict="PASS"))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    part = directory / "records-gw1.jsonl"
    # and the line that it was writing when it died is half there
    part.write_bytes(part.read_bytes() + b'{"kind":"check","family":"con')
    run = store.load(directory)
    assert [record.name for record in run.checks] == list("01234")
    assert len(run.lost) == 1
    assert not run.finished
    breaks = "\n".join(gate.judge_run(run).breaks)
    assert "did not finish" in breaks
    assert "cut off" in breaks
    # xdist may start another worker under the same name
    store.Recorder(directory, worker="gw1").add(check(name="5"))
    assert [record.name for record in store.load(directory).checks] == list("012345")


def test_a_controller_killed_before_it_removed_the_parts_doubles_nothing(tmp_path: Path) -> None:
    pages.write_run(write(tmp_path, [accuracy(), check()]))
    part = tmp_path / "records-gw0.jsonl"
    assert part.exists()
    assert len(store.load(tmp_path).records) == 2
    # but a broken line is named
    part.write_text('{"kind": "check"}\n' + part.read_text(encoding="utf-8"), encoding="utf-8")
    run = store.load(tmp_path)
    assert len(run.records) == 2
    assert [sentence.partition("gw0.jsonl, ")[2] for sentence in run.lost] == [
        "line 1 cannot be read: not a record: check.family: Field required"
    ]


def test_latest_run_is_the_newest_stamp(tmp_path: Path) -> None:
    for stamp in ("20250102T000000Z", "20250103T000000Z-0002", "20250103T000000Z"):
        write(tmp_path / "runs" / stamp, [check()])
    (tmp_path / "runs" / "20260101T000000Z").mkdir()  # started, but nothing was recorded
    assert store.find_run("latest", tmp_path).name == "20250103T000000Z-0002"
    assert store.find_run("20250102", tmp_path).name == "20250102T000000Z"
    with pytest.raises(FileNotFoundError, match="no run named '2024'"):
        store.find_run("2024", tmp_path)
    with pytest.raises(FileNotFoundError, match="make one with"):
        store.find_run("latest", tmp_path / "elsewhere")


def test_a_run_without_a_result_is_never_the_latest(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    started = store.start_run(runs / "20250103T000000Z", engine="native", command="pytest")
    with pytest.raises(FileNotFoundError, match="has a record: make one with"):
        store.find_run("latest", tmp_path)
    write(runs / "20250101T000000Z", [check()])
    assert store.find_run("latest", tmp_path).name == "20250101T000000Z"  # the other was killed
    started.finish(2)
    assert store.find_run("latest", tmp_path).name == "20250101T000000Z"  # or stopped by Ctrl-C
    # by its name it is still there
    assert store.load(store.find_run("20250103", tmp_path)).records == ()
    store.Recorder(runs / "20250102T000000Z", worker="gw0").add(check())
    assert store.find_run("latest", tmp_path).name == "20250102T000000Z"


# ---- pages


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """A run that has something of everything; 40 tensors, so that the HTML page folds its long table."""
    records: list[AnyRecord] = [accuracy(1e-3 + 6e-5 * i, tensor=t) for i, t in enumerate(ALL_TENSORS * 4)]
    records += [accuracy(0.0, tensor=t, family="exact") for t in ALL_TENSORS]
    records += [accuracy(3.1e-2, tensor="grad_up_lora_a", case="E=8,k=2,H=64,I=96,T=33,r=4,alpha=8@seed=7")]
    records += [accuracy(verdict="SKIP", isa="amx_bf16"), check(), check("CRASH", "test_refusal[a|b <i>]"), latency()]
    return write(tmp_path_factory.mktemp("some") / "run", records, exit_status=1)


def test_markdown_shows_the_numbers_of_the_records(run: store.Run) -> None:
    rows = markdown_rows(tables.accuracy_markdown(run), "rel-L2")
    assert len(rows) == len(run.accuracy)
    for row, record in zip(rows, tables.accuracy_rows(run), strict=True):
        assert (row["case"], row["tensor"], row["ISA"]) == (record.case, record.tensor, record.isa)
        assert row["verdict"] == record.verdict
        if record.gates:
            shown = [float(row[name]) for name in ("rel-L2", "mean-rel", "max abs", "budget")]
            exact = [record.rel_l2, record.mean_rel, record.max_abs, record.gates[0].budget]
            assert shown == pytest.approx(exact, rel=5e-3)
            assert float(row["cosine"]) == pytest.approx(record.cosine, abs=1e-7)
            assert float(row["used"].removesuffix(" %")) == pytest.approx(100 * record.used, abs=0.51)
    assert rows[0]["verdict"] == "FAIL"
    used = [float(row["used"].removesuffix(" %")) for row in rows if row["used"]]
    assert used == sorted(used, reverse=True)


def test_latency_table_shows_the_statistics_of_the_samples(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [latency((10.0, 12.0, 11.0, 30.0))])
    (row,) = markdown_rows(tables.latency_markdown(run), "min ms")
    assert row["mean ± std ms"] == "15.75 ± 9.54"
    assert [row[f"{name} ms"] for name in ("min", "p10", "median", "max")] == ["10.00", "10.30", "11.50", "30.00"]
    rates = [float(row[name]) for name in ("tokens/s", "GFLOP/s", "GB/s")]
    assert rates == pytest.approx([128 / 10e-3, 2300, 230], rel=1e-3)
    assert row["n"] == "4"
    assert Page(pages.page(run)).rows("min ms")[0]["GFLOP/s"] == row["GFLOP/s"]


def test_every_row_of_the_overview_is_labelled(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [accuracy(), accuracy(isa=""), check()])
    wanted = [("contract", tables.NO_ISA), ("forward", "avx2"), ("forward", tables.NO_ISA)]
    for rows in (
        Page(pages.page(run)).rows("nearest to its budget"),
        markdown_rows(tables.accuracy_markdown(run), "nearest to its budget"),
    ):
        assert [(row["family"], row["ISA"]) for row in rows] == wanted


def test_overview_counts_every_record(run: store.Run) -> None:
    rows = markdown_rows(tables.accuracy_markdown(run), "nearest to its budget")
    counted = sum(int(row[name] or 0) for row in rows for name in VERDICT_ORDER if name in row)
    assert counted == len(run.records)
    by_family = {(row["family"], row["ISA"]): row for row in rows}
    forward = by_family["forward", "avx2"]
    assert by_family["contract", tables.NO_ISA]["CRASH"] == by_family["forward", "amx_bf16"]["SKIP"] == "1"
    assert forward["FAIL"] == "1"
    assert forward["nearest to its budget"].startswith("775 % grad_up_lora_a of E=8,k=2")
    assert by_family["exact", "avx2"]["nearest to its budget"] == "every tensor exact"


FACTS = (
    "Imagined CPU 9000", "avx2 used", "avx512_bf16, avx2, scalar", "2 allowed of 4", "node 1: CPUs 2-3, 12.0 GiB",
    "control group allows 16.0 GiB", "torch 2.13.0", "ktverify 0.1.0", "g++ 12.2.0", "0123456789ab",
    "pytest suites/ -n 4", "1 min 24 s",
)  # fmt: skip


def test_every_printer_has_the_header(run: store.Run, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_run(run)
    page = Page(pages.page(run))
    for text in (tables.accuracy_markdown(run), tables.latency_markdown(run), page.text, capsys.readouterr().out):
        assert not [fact for fact in FACTS if fact not in text]


def test_html_shows_the_numbers_of_the_records(run: store.Run) -> None:
    page = Page(pages.page(run))
    rows = page.rows("rel-L2", "used")
    assert len(rows) == len(run.accuracy)
    grid = tables.accuracy_grid(tables.accuracy_rows(run))
    assert [tuple(row.values()) for row in rows] == list(grid.rows)
    assert "1 CRASH, 1 FAIL of 49 checks (1 SKIP)." in page.text
    assert "python -m ktverify repro 'E=8,k=2,H=64,I=96,T=33,r=4,alpha=8@seed=7' --isa avx2" in page.text
    assert "test_refusal[a|b <i>]" in page.text  # escaped on the way, or the parser had taken a tag
    assert ("table", "id", "accuracy") in page.attributes


def test_html_needs_nothing_from_outside(run: store.Run) -> None:
    text = pages.page(run)
    assert pages.page(run) == text, "the same run makes the same page"
    page = Page(text)
    assert "<svg" in text
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text, re.IGNORECASE)
    assert not [tag for tag, _, _ in page.attributes if tag in ("link", "iframe", "object", "embed")]
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_plots_show_every_record(run: store.Run) -> None:
    text = plots.rel_l2_by_tensor(run.accuracy)
    assert all(f">{tensor}<" in text for tensor in ALL_TENSORS)
    assert text.count(">1 exact<") == len(ALL_TENSORS)
    assert text.count("<use ") >= len([r for r in run.accuracy if r.gates and r.rel_l2 > 0])
    assert "did not pass" in text
    assert ">10.00 ms<" in plots.latency_bars(run.latency)
    assert "last bar: 145 % and more" in plots.budget_used(run.accuracy)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [accuracy(verdict="SKIP")],
        [accuracy(0.0)],
        [accuracy(math.nan, verdict="FAIL")],
        [accuracy(math.inf, verdict="FAIL")],
        [latency(())],
        [latency((5.0,))],
        [check("CRASH")],
    ],
    ids=["empty", "skip", "exact", "nan", "inf", "no samples", "one sample", "crash"],
)
def test_pages_of_runs_with_few_records(records: list[AnyRecord], tmp_path: Path) -> None:
    run = write(tmp_path / "run", records)
    pages.write_run(run)
    for name in ("accuracy.md", "latency.md", "report.html"):
        assert "Imagined CPU 9000" in (tmp_path / "run" / name).read_text(encoding="utf-8")
    console.print_run(run)


def test_a_run_without_its_head_is_still_shown(tmp_path: Path) -> None:
    store.Recorder(tmp_path / "run", worker="gw0").add(accuracy())
    run = store.load(tmp_path / "run")
    assert "the run's head was lost" in tables.accuracy_markdown(run)
    assert "small@seed=0" in pages.page(run)
    assert not gate.judge_run(run).passed


# ---- views of timed runs


@pytest.mark.parametrize("warning", ["", "other programs had 75 % of the processors: these times mean little"])
def test_a_disturbed_view_says_so_wherever_it_is_read(
    warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure(figsize=(3, 2), dpi=100)
    pictures = [style.png(figure), style.png(figure, warning)]
    heights = [struct.unpack(">II", picture[16:24])[1] for picture in pictures]
    assert (heights[1] > heights[0]) == bool(warning)
    grids = [Grid(title, ("a note",), ("what", "ms"), (("forward", "1"),)) for title in ("first", "later")]
    view = pages.View("sweep", "0.65 times the time", [], grids, [{"ms": 1.0}], pictures[1], warning)
    pages.conclude(view, [], tmp_path / "layer.jsonl", as_json=False)
    texts = [(tmp_path / f"sweep.{ending}").read_text(encoding="utf-8") for ending in ("md", "html")]
    # lines of a console may be broken
    texts.append(" ".join(capsys.readouterr().out.split()))
    for text in texts:
        assert ("0.65 times the time (disturbed)" in text) == bool(warning)
        if warning:
            assert text.count(warning) == len(grids)
