"""The gate over a run can fail: by a verdict, by what is missing, by growth against the baseline; never by time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktverify.checks import isas
from ktverify.judge.gates import Verdict
from ktverify.report import gate as gating
from ktverify.report import tables
from ktverify.report.baseline import Baseline, key_of, path_for, read
from ktverify.report.gate import GateReport, Growth, judge_run, write_baseline
from ktverify.report.style import CONSOLE_STYLES
from ktverify.runs import store
from ktverify.runs.record import VERDICT_ORDER, AccuracyRecord, AnyRecord, Selection, VerdictName
from ktverify.system.files import ROOT
from ktverify.system.machine import Machine
from tests.support.records import MACHINE, accuracy, check, latency, write

GROWTH = Growth(factor=1.25, floor=1e-4)
BAD: tuple[VerdictName, ...] = ("FAIL", "CRASH", "TIMEOUT", "OOM", "MISTRUSTED")


def gated(run: store.Run, baseline: Baseline | None = None) -> GateReport:
    return judge_run(run, baseline, GROWTH)


def test_a_good_run_passes(tmp_path: Path) -> None:
    report = gated(write(tmp_path / "run", [accuracy(), latency(), check()]))
    assert report.passed
    assert report.checked == 3


def test_gates_records_and_pages_know_the_same_verdicts() -> None:
    names = {verdict.value for verdict in Verdict}
    assert names == set(VERDICT_ORDER) == set(tables.OVERVIEW_VERDICTS) == set(CONSOLE_STYLES) - {"WARNING"}


BREAKS: dict[str, tuple[list[AnyRecord], int, str]] = {
    **{name: ([check(), check(name, "test_broken")], 0, f"contract/- test_broken: {name} the reason") for name in BAD},
    "a tensor, with its repro": (
        [accuracy(), accuracy(3.1e-2, tensor="grad_input")],
        0,
        "forward/avx2 small@seed=0: FAIL grad_input rel_l2 3.1e-02\n"
        "    python -m ktverify repro 'small@seed=0' --isa avx2 --tensor grad_input",
    ),
    "empty": ([], 0, "Nothing was checked"),
    "all skip": ([accuracy(verdict="SKIP"), check("UNSUPPORTED")], 0, "Nothing was checked"),
    "no record of the failure": ([accuracy()], 2, "exit status 2"),
    "a pass without a gate": ([accuracy().model_copy(update={"gates": ()})], 0, "PASS without a single gate"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_breaks_a_run(name: str, tmp_path: Path) -> None:
    records, exit_status, text = BREAKS[name]
    report = gated(write(tmp_path / "run", records, exit_status))
    assert not report.passed
    assert len(report.breaks) == 1
    assert text in report.breaks[0]


def test_what_an_engine_disclaims_is_a_note_for_each_capability(tmp_path: Path) -> None:
    def disclaimed(what: str) -> AnyRecord:
        reason = {"verdict": "UNSUPPORTED", "message": f"UNSUPPORTED {what} is disclaimed"}
        return check(name=f"test {what}").model_copy(update=reason)

    values = ("tp 2", "tp 4", "tp 8", "methods MXFP4_SFT", "skip_lora")
    report = gated(write(tmp_path / "run", [check(), *map(disclaimed, values)]))
    assert report.passed
    assert sorted(note.partition(": ")[2] for note in report.notes) == [
        "UNSUPPORTED methods MXFP4_SFT is disclaimed",
        "UNSUPPORTED skip_lora is disclaimed",
        "UNSUPPORTED tp 2 is disclaimed (and 2 more checks)",
    ]


def baseline_of(tmp_path: Path, records: list[AnyRecord]) -> Baseline:
    write_baseline(write(tmp_path / "base", records), tmp_path / "baseline.json")
    return read(tmp_path / "baseline.json")


def test_a_run_passes_against_its_own_baseline(tmp_path: Path) -> None:
    records: list[AnyRecord] = [accuracy(), accuracy(0.0, isa="scalar"), latency(), check(), check("SKIP", "test_tp")]
    baseline = baseline_of(tmp_path, records)
    assert len(baseline.checks) == 5
    assert gated(write(tmp_path / "run", records), baseline).passed


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_check_missing_against_the_baseline_flips_the_gate(missing: int, tmp_path: Path) -> None:
    records: list[AnyRecord] = [accuracy(), latency(), check()]
    baseline = baseline_of(tmp_path, records)
    report = gated(write(tmp_path / "run", records[:missing] + records[missing + 1 :]), baseline)
    assert report.breaks == (f"missing: {key_of(records[missing])} (it was PASS in the baseline)",)


@pytest.mark.parametrize(
    ("before", "now", "case", "grown"),
    [
        (2.4e-3, 2.9e-3, "small@seed=0", False),
        (2.4e-3, 3.1e-3, "small@seed=0", True),
        # another seed has other errors: its budget judges it
        (2.4e-3, 3.1e-3, "small@seed=5", False),
        # below the floor growth does not count
        (1e-6, 9e-5, "small@seed=0", False),
        (1e-6, 1.1e-4, "small@seed=0", True),
    ],
)
def test_an_error_may_grow_by_a_factor_from_a_floor_on(
    before: float, now: float, case: str, grown: bool, tmp_path: Path
) -> None:
    report = gated(write(tmp_path / "run", [accuracy(now, case=case)]), baseline_of(tmp_path, [accuracy(before)]))
    assert [line.partition(",")[0] for line in report.breaks] == (
        [f"grown: accuracy forward small output avx2 tp=1 rel_l2 {now:.2e}"] if grown else []
    )


def test_the_allowed_growth_is_in_the_tolerances() -> None:
    allowed = gating.growth()
    assert 1 < allowed.factor < 2
    assert 0 < allowed.floor < 1e-3


def test_time_is_never_gated(tmp_path: Path) -> None:
    baseline = baseline_of(tmp_path, [latency((1.0, 1.0))])
    assert gated(write(tmp_path / "run", [latency((500.0, 500.0))]), baseline).passed


def test_skip_breaks_only_where_the_baseline_passed(tmp_path: Path) -> None:
    baseline = baseline_of(tmp_path, [check(), check("SKIP", "test_never")])
    report = gated(write(tmp_path / "run", [check("SKIP"), check("SKIP", "test_never"), accuracy()]), baseline)
    assert report.breaks == ("contract/- test_refusal[rank]: SKIP the reason (it was PASS in the baseline)",)
    assert "contract/- test_never: SKIP the reason" in report.notes


# what the CPUs of four machines run
PROFILES = {
    "amx": ("amx_bf16", "avx512_bf16", "avx2", "scalar"),
    "avx512": ("avx512_bf16", "avx2", "scalar"),
    "avx2": ("avx2", "scalar"),
    "scalar": ("scalar",),
}


def full_run(profile: str) -> list[AnyRecord]:
    """A record of each kind that a whole run leaves on such a machine."""
    planned = isas.native_on(PROFILES[profile], trapped=False)
    records: list[AnyRecord] = [check(name="test_process[fork_before_use]")]
    for case, tier in (("small@seed=0", "default"), ("deepseek_v3_t4@seed=0", "big")):
        records += [accuracy(isa=isa.label, case=case) for isa in isas.of_tier(tier, planned)]
    for isa in planned:
        one = check(name=f"test_behaviour[repeats-{isa.id}]")
        records.append(one.model_copy(update={"isa": isa.label}))
    return [*records, latency(isa=planned[0].label)]


def run_on(profile: str, records: list[AnyRecord], directory: Path, selection: Selection | None = None) -> store.Run:
    run = write(directory, records)
    assert run.head is not None
    machine = Machine(**{**vars(MACHINE), "isas": PROFILES[profile]})
    head = run.head.model_copy(update={"machine": machine, "selection": selection or Selection()})
    return store.Run(run.directory, head, run.records)


@pytest.mark.parametrize("here", PROFILES)
@pytest.mark.parametrize("there", PROFILES)
def test_machines_are_compared_on_what_both_run(there: str, here: str, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(run_on(there, full_run(there), tmp_path / "base"), path)
    baseline, records = read(path), full_run(here)
    report = gated(run_on(here, records, tmp_path / "run"), baseline)
    assert report.breaks == ()
    left_out = sum(int(note.split()[0]) for note in report.notes if "of the baseline" in note)
    assert left_out == len(baseline.checks.keys() - {key_of(record) for record in records})
    for number, record in enumerate(records):
        if key_of(record) not in baseline.checks:
            continue
        lost = run_on(here, records[:number] + records[number + 1 :], tmp_path / f"lost{number}")
        assert gated(lost, baseline).breaks == (f"missing: {key_of(record)} (it was PASS in the baseline)",)
        if isinstance(record, AccuracyRecord):
            grown = [*records[:number], accuracy(3.9e-3, isa=record.isa, case=record.case), *records[number + 1 :]]
            found = gated(run_on(here, grown, tmp_path / f"grown{number}"), baseline).breaks
            assert [text.split()[0] for text in found] == ["grown:"]


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        (Selection(isa="avx2"), lambda key: "scalar" not in key and "avx512" not in key and "amx" not in key),
        (Selection(folders=("contract",)), lambda key: key.startswith("check contract")),
        (Selection(tier="big"), lambda key: "forward small" not in key or "latency" in key),
        (Selection(cases="small"), lambda key: "deepseek_v3" not in key),
        (Selection(rest=("-k repeats",)), lambda key: "repeats" in key),
    ],
    ids=["isa", "folders", "tier", "cases", "rest"],
)
def test_what_nobody_asked_for_is_counted_and_does_not_break(
    selection: Selection, kept: Callable[[str], bool], tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(run_on("avx512", full_run("avx512"), tmp_path / "base"), path)
    records = [record for record in full_run("avx512") if kept(key_of(record))]
    report = gated(run_on("avx512", records, tmp_path / "run", selection), read(path))
    assert report.breaks == ()
    assert [note for note in report.notes if "of the baseline" in note]
    if not selection.rest:
        report = gated(run_on("avx512", records[1:], tmp_path / "lost", selection), read(path))
        assert report.breaks == (f"missing: {key_of(records[0])} (it was PASS in the baseline)",)


def test_real_and_emulated_tiles_are_the_same_check(tmp_path: Path) -> None:
    assert key_of(accuracy(isa="amx_bf16 (emulated)")) == key_of(accuracy(isa="amx_bf16"))
    names = [check(name=f"test_behaviour[{isa}-repeats]") for isa in ("amx_bf16_emulated", "amx_bf16")]
    assert key_of(names[0]) == key_of(names[1])
    baseline = baseline_of(tmp_path, [accuracy(isa="amx_bf16 (emulated)")])
    report = gated(run_on("amx", [accuracy(isa="amx_bf16")], tmp_path / "run"), baseline)
    assert report.passed
    assert "amx_bf16 is real in this run and emulated in the baseline: 1 checks were compared" in report.notes


def test_the_committed_baseline_has_present_keys() -> None:
    baseline = read(ROOT / "reports" / "baseline.json")
    assert len(baseline.checks) > 2000
    assert not [key for key in baseline.checks if "emulated" in key]
    # a timing is one of the machine, on its best instruction set
    assert not [key for key in baseline.checks if key.startswith("latency") and "avx512" in key]


@pytest.mark.parametrize(
    ("engine", "records", "text"),
    [
        ("native", [accuracy()], "has 2 checks, 1 of which this run of 1 lacks"),
        ("other:engine", [accuracy(), check()], "is the baseline of engine native, this run is of other:engine"),
        ("native", [accuracy(), check(), latency()], ""),
    ],
    ids=["fewer", "another engine", "more"],
)
def test_a_baseline_is_replaced_only_by_more_of_its_engine(
    engine: str, records: list[AnyRecord], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(write(tmp_path / "base", [accuracy(), check()]), path)
    before = path.read_bytes()
    run = write(tmp_path / "run", records)
    assert run.head is not None
    run = store.Run(run.directory, run.head.model_copy(update={"engine": engine}), run.records)
    if text:
        with pytest.raises(ValueError, match=text):
            write_baseline(run, path)
        assert path.read_bytes() == before
    assert len(write_baseline(run, path, force=bool(text)).checks) == len(records)


def test_each_engine_has_a_baseline_of_its_own(tmp_path: Path) -> None:
    names = ["native", "torch_bf16", "pkg.module:make", "/a/engine.py:make", "/b/other.py:make"]
    paths = [path_for(name, tmp_path) for name in names]
    assert paths[0].name == "baseline.json"
    assert len(set(paths)) == len(names)
    assert all(path.parent == tmp_path for path in paths)


def test_a_broken_run_makes_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no baseline"):
        write_baseline(write(tmp_path / "run", [accuracy(1.0)]), tmp_path / "baseline.json")
    assert not (tmp_path / "baseline.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_file_that_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="baseline"):
        read(tmp_path / "baseline.json")
