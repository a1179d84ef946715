"""The gate over a run can fail: by a verdict, by what is missing, by growth against the baseline; never by time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktverify.judge.gates import Verdict
from ktverify.report import tables
from ktverify.report.baseline import (
    Baseline,
    GateReport,
    Growth,
    growth,
    judge_run,
    key_of,
    read_baseline,
    write_baseline,
)
from ktverify.report.style import CONSOLE_STYLES
from ktverify.runs import store
from ktverify.runs.record import VERDICT_ORDER, Result, VerdictName
from ktverify.system.machine import Machine
from tests.support.records import MACHINE, accuracy, check, latency, write

GROWTH = Growth(factor=1.25, floor=1e-4)


def gated(run: store.Run, baseline: Baseline | None = None) -> GateReport:
    return judge_run(run, baseline, GROWTH)


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
    assert names == set(VERDICT_ORDER) == set(tables.OVERVIEW_VERDICTS) == set(CONSOLE_STYLES) - {"WARNING"}


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


def baseline_of(tmp_path: Path, records: list[Result]) -> Baseline:
    write_baseline(write(tmp_path / "base", records), tmp_path / "baseline.json")
    return read_baseline(tmp_path / "baseline.json")


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
    assert finding.breaks == (f"missing: {key_of(records[missing])} (it was PASS in the baseline)",)


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
    allowed = growth()
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
