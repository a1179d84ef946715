"""Records, runs, pages and the gate: what is shown is what was recorded, and the gate can fail."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ktverify.gates import Verdict
from ktverify.machine import Amx, Machine, NumaNode, isas_of, read_machine
from ktverify.names import ALL_TENSORS
from ktverify.report import console, gate, html, plots, store, tables
from ktverify.report.record import (
    VERDICT_ORDER,
    AccuracyRecord,
    CheckRecord,
    GateRecord,
    LatencyRecord,
    Result,
    RunRecord,
    VerdictName,
    parse_line,
    worst_first,
)

MACHINE = Machine(
    cpu="Imagined CPU 9000",
    architecture="x86_64",
    isas=("avx512_bf16", "avx2", "scalar"),
    flags=("avx2", "fma"),
    amx=Amx(cpu=False, kernel=False, permitted=False, emulated=False),
    threads=2,
    cpus_online=4,
    numa=(NumaNode(0, "0-1", 12 << 30), NumaNode(1, "2-3", 12 << 30)),
    memory_total_bytes=24 << 30,
    memory_limit_bytes=16 << 30,
    memory_available_bytes=15 << 30,
    huge_pages="madvise",
    huge_pages_free=0,
    system="Linux 6.1",
    versions={"python": "3.11.7", "torch": "2.13.0", "ktverify": "0.1.0", "compiler": "g++ 12.2.0"},
)
GROWTH = gate.Growth(factor=1.25, floor=1e-4)


def accuracy(
    rel_l2: float = 2.4e-3,
    budget: float = 4e-3,
    verdict: VerdictName | None = None,
    case: str = "small@seed=0",
    tensor: str = "output",
    isa: str = "avx2",
    family: str = "forward",
) -> AccuracyRecord:
    """A record whose only gate is rel_l2 against `budget`; it passes if that is kept."""
    verdict = verdict or ("PASS" if rel_l2 <= budget else "FAIL")
    gates = (
        ()
        if verdict in ("SKIP", "UNSUPPORTED")
        else (GateRecord(gate="rel_l2", value=rel_l2, budget=budget, used=rel_l2 / budget, verdict=verdict),)
    )
    return AccuracyRecord(
        family=family,
        engine="native",
        isa=isa,
        verdict=verdict,
        message=f"{verdict} {tensor} rel_l2 {rel_l2:.1e}",
        case=case,
        tensor=tensor,
        mean_rel=rel_l2 * 0.875,
        rel_l2=rel_l2,
        cosine=0.99999712,
        max_abs=0.0123,
        worst_index=(3, 5),
        gates=gates,
        repro=f"python -m ktverify repro '{case}' --isa {isa} --tensor {tensor}",
    )


def latency(samples: tuple[float, ...] = (10.0, 12.0, 11.0, 30.0), isa: str = "avx2") -> LatencyRecord:
    return LatencyRecord(
        family="latency",
        engine="native",
        isa=isa,
        verdict="PASS",
        case="small@seed=0",
        what="forward",
        threads=2,
        samples_ms=samples,
        warmup=5,
        tokens=128,
        flops=23e9,
        bytes=2.3e9,
    )


def check(verdict: VerdictName = "PASS", name: str = "test_refusal[rank]") -> CheckRecord:
    return CheckRecord(family="contract", engine="native", name=name, verdict=verdict, message="told why")


def write(directory: Path, records: list[Result], exit_status: int = 0) -> store.Run:
    """A finished run of `records` in `directory`, without its pages."""
    head = RunRecord(
        stamp=directory.name,
        engine="native",
        command="pytest suites/ -n 4",
        commit="0123456789ab",
        machine=MACHINE,
        workers=4,
        started=1000.0,
        finished=1083.5,
        exit_status=exit_status,
    )
    recorder = store.Recorder(directory, worker="gw0")
    recorder.add(head)
    for record in records:
        recorder.add(record)
    return store.load(directory)


def gated(run: store.Run, baseline: gate.Baseline | None = None) -> gate.Finding:
    return gate.judge_run(run, baseline, GROWTH)


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


def test_a_pass_cannot_hold_a_failed_gate() -> None:
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
    records: list[Result] = [
        accuracy(1e-3),
        accuracy(verdict="SKIP"),
        accuracy(3.9e-3),
        check("CRASH"),
        accuracy(5e-3),
        accuracy(9e-3),
        accuracy(math.nan, verdict="FAIL"),
    ]
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
    assert sorted(path.name for path in directory.iterdir()) == [
        "accuracy.md",
        "latency.md",
        "records.jsonl",
        "report.html",
    ]
    again = store.load(directory)
    assert again.records == run.records
    assert again.head == run.head


def test_a_killed_workers_part_is_still_read(tmp_path: Path) -> None:
    directory = tmp_path / "20250101T000000Z"
    store.start_run(directory, engine="native", command="pytest")
    program = f"""
        import os, signal, sys
        from ktverify.report.record import CheckRecord
        from ktverify.report.store import Recorder
        recorder = Recorder({str(directory)!r}, worker="gw1")
        for number in range(5):
            recorder.add(CheckRecord(family="contract", engine="native", name=str(number), verdict="PASS"))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(store.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    part = directory / "records-gw1.jsonl"
    # and the line that it was writing when it died is half there
    part.write_bytes(part.read_bytes() + b'{"kind":"check","family":"con')
    run = store.load(directory)
    assert [record.name for record in run.checks] == list("01234")
    assert run.torn_lines == 1
    assert not run.finished
    finding = gated(run)
    assert any("did not finish" in line for line in finding.breaks)
    assert any("cut off" in line for line in finding.breaks)
    # xdist may start another worker under the same name
    store.Recorder(directory, worker="gw1").add(check(name="5"))
    assert [record.name for record in store.load(directory).checks] == list("012345")


def test_a_broken_line_within_a_part_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "run", [check()])
    part = tmp_path / "run" / "records-gw0.jsonl"
    part.write_text('{"kind": "check"}\n' + part.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"records-gw0.jsonl, line 1: not a record"):
        store.load(tmp_path / "run")


def test_a_controller_killed_before_it_removed_the_parts_doubles_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run = write(directory, [accuracy(), check()])
    store.write_run(run)
    assert (directory / "records-gw0.jsonl").exists()
    assert len(store.load(directory).records) == 2


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "run", [check()])
    with pytest.raises(FileExistsError, match="already holds a run"):
        store.start_run(tmp_path / "run", engine="native", command="pytest")


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


# ---- pages


class Page(HTMLParser):
    """The cells of every table, by the table's headings; all attributes; all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell.append(data)

    def rows(self, *headings: str) -> list[dict[str, str]]:
        """Rows of the last table that has these headings."""
        for table in reversed(self.tables):
            if set(headings) <= set(table[0]):
                return [dict(zip(table[0], row, strict=True)) for row in table[1:]]
        raise AssertionError(f"no table with {headings}")


def markdown_rows(text: str, heading: str) -> list[dict[str, str]]:
    """Rows of the Markdown table whose head has the cell `heading`."""
    found: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if found and not cells:
            break
        if cells and (found or heading in cells):
            found.append(cells)
    return [dict(zip(found[0], row, strict=True)) for row in found[2:]]


def some_run(directory: Path) -> store.Run:
    """A run that has something of everything; 40 tensors, so that the HTML page folds its long table."""
    records: list[Result] = [accuracy(1e-3 + 6e-5 * i, tensor=t) for i, t in enumerate(ALL_TENSORS * 4)]
    records += [accuracy(0.0, tensor=t, family="exact") for t in ALL_TENSORS]
    records += [accuracy(3.1e-2, tensor="grad_up_lora_a", case="E=8,k=2,H=64,I=96,T=33,r=4,alpha=8@seed=7")]
    records += [accuracy(verdict="SKIP", isa="amx_bf16"), check(), check("CRASH", "test_refusal[a|b <i>]"), latency()]
    return write(directory, records, exit_status=1)


def test_markdown_shows_the_numbers_of_the_records(tmp_path: Path) -> None:
    run = some_run(tmp_path / "run")
    rows = markdown_rows(tables.accuracy_markdown(run), "rel-L2")
    assert len(rows) == len(run.accuracy)
    for row, record in zip(rows, tables.accuracy_rows(run), strict=True):
        assert (row["case"], row["tensor"], row["ISA"]) == (record.case, record.tensor, record.isa)
        assert row["verdict"] == record.verdict
        if record.gates:
            assert float(row["rel-L2"]) == pytest.approx(record.rel_l2, rel=5e-3)
            assert float(row["mean-rel"]) == pytest.approx(record.mean_rel, rel=5e-3)
            assert float(row["cosine"]) == pytest.approx(record.cosine, abs=1e-7)
            assert float(row["max abs"]) == pytest.approx(record.max_abs, rel=5e-3)
            assert float(row["budget"]) == pytest.approx(record.gates[0].budget, rel=5e-3)
            assert float(row["used"].removesuffix(" %")) == pytest.approx(100 * record.used, abs=0.51)
    assert rows[0]["verdict"] == "FAIL"
    used = [float(row["used"].removesuffix(" %")) for row in rows if row["used"]]
    assert used == sorted(used, reverse=True)


def test_latency_table_shows_the_statistics_of_the_samples(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [latency((10.0, 12.0, 11.0, 30.0))])
    (row,) = markdown_rows(tables.latency_markdown(run), "median ms")
    assert row["mean ± std ms"] == "15.75 ± 9.54"
    assert (row["median ms"], row["min ms"], row["max ms"]) == ("11.50", "10.00", "30.00")
    assert float(row["tokens/s"]) == pytest.approx(128 / 11.5e-3, rel=1e-3)
    assert float(row["GFLOP/s"]) == pytest.approx(2000, rel=1e-3)
    assert float(row["GB/s"]) == pytest.approx(200, rel=1e-3)
    assert row["n"] == "4"
    assert Page(html.page(run)).rows("median ms")[0]["GFLOP/s"] == row["GFLOP/s"]


def test_overview_counts_every_record(tmp_path: Path) -> None:
    run = some_run(tmp_path / "run")
    rows = markdown_rows(tables.accuracy_markdown(run), "nearest to its budget")
    counted = sum(int(row[name] or 0) for row in rows for name in VERDICT_ORDER if name in row)
    assert counted == len(run.records)
    by_family = {(row["family"], row["ISA"]): row for row in rows}
    assert by_family["contract", ""]["CRASH"] == "1"
    assert by_family["forward", "avx2"]["FAIL"] == "1"
    assert by_family["forward", "avx2"]["nearest to its budget"].startswith("775 % grad_up_lora_a of E=8,k=2")
    assert by_family["forward", "amx_bf16"]["SKIP"] == "1"
    assert by_family["exact", "avx2"]["nearest to its budget"] == "every tensor exact"


def test_every_printer_has_the_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = some_run(tmp_path / "run")
    console.print_run(run)
    page = Page(html.page(run))
    for text in (tables.accuracy_markdown(run), tables.latency_markdown(run), page.text, capsys.readouterr().out):
        for fact in (
            "Imagined CPU 9000",
            "avx2 used",
            "avx512_bf16, avx2, scalar",
            "2 allowed of 4",
            "node 1: CPUs 2-3, 12.0 GiB",
            "control group allows 16.0 GiB",
            "torch 2.13.0",
            "ktverify 0.1.0",
            "g++ 12.2.0",
            "0123456789ab",
            "pytest suites/ -n 4",
            "1 min 24 s",
        ):
            assert fact in text


def test_html_shows_the_numbers_of_the_records(tmp_path: Path) -> None:
    run = some_run(tmp_path / "run")
    page = Page(html.page(run))
    rows = page.rows("rel-L2", "used")
    assert len(rows) == len(run.accuracy)
    for row, record in zip(rows, tables.accuracy_rows(run), strict=True):
        for column in tables.ACCURACY_COLUMNS:
            assert row[column.heading] == column.cell(record)
    assert "1 CRASH, 1 FAIL of 49 checks (1 SKIP)." in page.text
    assert "python -m ktverify repro 'E=8,k=2,H=64,I=96,T=33,r=4,alpha=8@seed=7' --isa avx2" in page.text
    assert "test_refusal[a|b <i>]" in page.text  # escaped on the way, or the parser had taken a tag
    assert ("table", "id", "accuracy") in page.attributes


def test_html_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = html.page(some_run(tmp_path / "run"))
    page = Page(text)
    assert "<svg" in text
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text, re.IGNORECASE)
    assert not [tag for tag, _, _ in page.attributes if tag in ("link", "iframe", "object", "embed")]
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_the_same_run_makes_the_same_page(tmp_path: Path) -> None:
    run = some_run(tmp_path / "run")
    assert html.page(run) == html.page(run)


def test_plots_show_every_record(tmp_path: Path) -> None:
    run = some_run(tmp_path / "run")
    text = plots.rel_l2_by_tensor(run.accuracy)
    for tensor in ALL_TENSORS:
        assert f">{tensor}<" in text
    assert text.count(">1 exact<") == len(ALL_TENSORS)
    drawn = len(re.findall(r"<use ", text))
    shown = [r for r in run.accuracy if r.gates and r.rel_l2 > 0]
    assert drawn >= len(shown)
    assert "did not pass" in text
    assert ">11.50 ms<" in plots.latency_bars(run.latency)
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
def test_pages_of_meagre_runs(records: list[Result], tmp_path: Path) -> None:
    run = write(tmp_path / "run", records)
    store.write_run(run)
    assert "Imagined CPU 9000" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    console.print_run(run)


def test_a_run_without_its_head_is_still_shown(tmp_path: Path) -> None:
    store.Recorder(tmp_path / "run", worker="gw0").add(accuracy())
    run = store.load(tmp_path / "run")
    assert "the run's head was lost" in tables.accuracy_markdown(run)
    assert "small@seed=0" in html.page(run)
    assert not gated(run).passed


# ---- the gate


def test_a_good_run_passes(tmp_path: Path) -> None:
    finding = gated(write(tmp_path / "run", [accuracy(), latency(), check()]))
    assert finding.passed
    assert finding.checked == 3


@pytest.mark.parametrize("verdict", ["FAIL", "CRASH", "TIMEOUT", "OOM", "MISTRUSTED"])
def test_one_verdict_that_is_no_pass_flips_the_gate(verdict: VerdictName, tmp_path: Path) -> None:
    finding = gated(write(tmp_path / "run", [accuracy(), check(), check(verdict, "test_broken")]))
    assert finding.breaks == (f"contract/- test_broken: {verdict} told why",)


def test_gates_records_and_pages_know_the_same_verdicts() -> None:
    names = {verdict.value for verdict in Verdict}
    assert names == set(VERDICT_ORDER) == set(tables.OVERVIEW_VERDICTS) == set(console.STYLES)


def test_a_failed_tensor_is_named_with_its_repro(tmp_path: Path) -> None:
    (line,) = gated(write(tmp_path / "run", [accuracy(), accuracy(3.1e-2, tensor="grad_input")])).breaks
    assert line.splitlines() == [
        "forward/avx2 small@seed=0: FAIL grad_input rel_l2 3.1e-02",
        "    python -m ktverify repro 'small@seed=0' --isa avx2 --tensor grad_input",
    ]


@pytest.mark.parametrize("records", [[], [accuracy(verdict="SKIP"), check("UNSUPPORTED")]], ids=["empty", "all skip"])
def test_a_run_that_checked_nothing_fails(records: list[Result], tmp_path: Path) -> None:
    finding = gated(write(tmp_path / "run", records))
    assert not finding.passed
    assert "Nothing was checked" in finding.breaks[0]


def test_a_session_that_broke_without_a_record_fails(tmp_path: Path) -> None:
    finding = gated(write(tmp_path / "run", [accuracy()], exit_status=2))
    assert "exit status 2" in finding.breaks[0]


def test_a_pass_without_a_gate_fails(tmp_path: Path) -> None:
    empty = accuracy().model_copy(update={"gates": ()})
    assert "without a single gate" in gated(write(tmp_path / "run", [empty])).breaks[0]


def baseline_of(tmp_path: Path, records: list[Result]) -> gate.Baseline:
    gate.write_baseline(write(tmp_path / "base", records), tmp_path / "baseline.json")
    return gate.read_baseline(tmp_path / "baseline.json")


def test_a_run_passes_against_its_own_baseline(tmp_path: Path) -> None:
    records: list[Result] = [accuracy(), accuracy(0.0, isa="scalar"), latency(), check(), check("SKIP", "test_tp")]
    baseline = baseline_of(tmp_path, records)
    assert len(baseline.checks) == 5
    assert gated(write(tmp_path / "run", records), baseline).passed


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_check_missing_against_the_baseline_flips_the_gate(missing: int, tmp_path: Path) -> None:
    records: list[Result] = [accuracy(), latency(), check()]
    baseline = baseline_of(tmp_path, records)
    finding = gated(write(tmp_path / "run", records[:missing] + records[missing + 1 :]), baseline)
    assert finding.breaks == (f"missing: {gate.key_of(records[missing])} (it was PASS in the baseline)",)


def test_growth_beyond_the_factor_flips_the_gate(tmp_path: Path) -> None:
    baseline = baseline_of(tmp_path, [accuracy(2.4e-3)])
    assert gated(write(tmp_path / "a", [accuracy(2.9e-3)]), baseline).passed
    finding = gated(write(tmp_path / "b", [accuracy(3.1e-3)]), baseline)
    assert finding.breaks[0].startswith("grown: accuracy forward small output avx2 tp=1 rel_l2 3.10e-03")
    # another seed has other errors; its budget judges it
    assert gated(write(tmp_path / "c", [accuracy(3.1e-3, case="small@seed=5")]), baseline).passed


def test_growth_below_the_floor_is_none(tmp_path: Path) -> None:
    baseline = baseline_of(tmp_path, [accuracy(1e-6)])
    assert gated(write(tmp_path / "a", [accuracy(9e-5)]), baseline).passed
    assert not gated(write(tmp_path / "b", [accuracy(1.1e-4)]), baseline).passed


def test_the_allowed_growth_has_its_place_in_the_tolerances() -> None:
    allowed = gate.growth()
    assert 1 < allowed.factor < 2
    assert 0 < allowed.floor < 1e-3


def test_time_is_never_gated(tmp_path: Path) -> None:
    baseline = baseline_of(tmp_path, [latency((1.0, 1.0))])
    assert gated(write(tmp_path / "run", [latency((500.0, 500.0))]), baseline).passed


def test_skip_breaks_only_where_the_baseline_passed(tmp_path: Path) -> None:
    baseline = baseline_of(tmp_path, [check(), check("SKIP", "test_never")])
    finding = gated(write(tmp_path / "run", [check("SKIP"), check("SKIP", "test_never"), accuracy()]), baseline)
    assert finding.breaks == ("contract/- test_refusal[rank]: SKIP told why (it was PASS in the baseline)",)
    assert "contract/- test_never: SKIP told why" in finding.notes


def test_an_isa_that_the_machine_lacks_is_told_and_does_not_break(tmp_path: Path) -> None:
    records: list[Result] = [accuracy(), accuracy(isa="avx512_bf16"), accuracy(isa="amx_bf16 (emulated)")]
    baseline = baseline_of(tmp_path, records)
    run = write(tmp_path / "run", records[:1])
    assert len(gated(run, baseline).breaks) == 2  # this machine has AVX-512, and AMX can be emulated on it
    assert run.head is not None
    lesser = Machine(**{**vars(MACHINE), "isas": ("avx2", "scalar")})
    run = store.Run(run.directory, run.head.model_copy(update={"machine": lesser}), run.records)
    finding = gated(run, baseline)
    assert finding.passed
    assert len([note for note in finding.notes if "which this machine does not run" in note]) == 2


def test_real_and_emulated_tiles_are_the_same_check() -> None:
    assert gate.key_of(accuracy(isa="amx_bf16 (emulated)")) == gate.key_of(accuracy(isa="amx_bf16"))


def test_a_broken_run_makes_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no baseline"):
        gate.write_baseline(write(tmp_path / "run", [accuracy(1.0)]), tmp_path / "baseline.json")
    assert not (tmp_path / "baseline.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_file_that_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="baseline"):
        gate.read_baseline(tmp_path / "baseline.json")


# ---- the machine


def test_the_machine_tells_what_it_knows() -> None:
    here = read_machine()
    assert here.cpu
    assert here.isas[-1] == "scalar"
    assert 1 <= here.threads <= here.cpus_online
    assert 0 < here.memory_available_bytes <= here.memory_total_bytes
    assert here.versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


@pytest.mark.parametrize(
    ("lacking", "kernel", "expected"),
    [
        ("", True, ("amx_bf16", "avx512_bf16", "avx2", "scalar")),
        ("", False, ("avx512_bf16", "avx2", "scalar")),
        ("amx_bf16", True, ("avx512_bf16", "avx2", "scalar")),
        ("avx512_bf16", True, ("avx2", "scalar")),
        ("fma", True, ("amx_bf16", "avx512_bf16", "scalar")),
    ],
)
def test_isas_follow_the_flags_and_the_kernel(lacking: str, kernel: bool, expected: tuple[str, ...]) -> None:
    flags = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx2", "fma"}
    amx = Amx(cpu=lacking != "amx_bf16", kernel=kernel, permitted=False, emulated=False)
    assert isas_of(frozenset(flags - {lacking}), amx) == expected
