"""The gate over a run can fail: by a verdict, by what is missing, by growth against the baseline; never by time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktverify.judge.gates import Verdict
from ktverify.report import baseline as gating
from ktverify.report import tables
from ktverify.report.baseline import Baseline, GateReport, Growth, judge_run, key_of, read_baseline, write_baseline
from ktverify.report.style import CONSOLE_STYLES
from ktverify.runs import store
from ktverify.runs.record import VERDICT_ORDER, AnyRecord, VerdictName
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


def baseline_of(tmp_path: Path, records: list[AnyRecord]) -> Baseline:
    write_baseline(write(tmp_path / "base", records), tmp_path / "baseline.json")
    return read_baseline(tmp_path / "baseline.json")


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


def test_an_isa_that_the_machine_lacks_is_noted_and_does_not_break(tmp_path: Path) -> None:
    records: list[AnyRecord] = [accuracy(), accuracy(isa="avx512_bf16"), accuracy(isa="amx_bf16 (emulated)")]
    baseline = baseline_of(tmp_path, records)
    run = write(tmp_path / "run", records[:1])
    assert len(gated(run, baseline).breaks) == 2  # this machine has AVX-512, and AMX can be emulated on it
    assert run.head is not None
    lesser = Machine(**{**vars(MACHINE), "isas": ("avx2", "scalar")})
    run = store.Run(run.directory, run.head.model_copy(update={"machine": lesser}), run.records)
    report = gated(run, baseline)
    assert report.passed
    assert len([note for note in report.notes if "which this machine does not run" in note]) == 2


def test_real_and_emulated_tiles_are_the_same_check() -> None:
    assert key_of(accuracy(isa="amx_bf16 (emulated)")) == key_of(accuracy(isa="amx_bf16"))


def test_a_broken_run_makes_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no baseline"):
        write_baseline(write(tmp_path / "run", [accuracy(1.0)]), tmp_path / "baseline.json")
    assert not (tmp_path / "baseline.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_file_that_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="baseline"):
        read_baseline(tmp_path / "baseline.json")
