"""`bench kernels`: the table of tunables agrees with the sources, other values are compiled and timed in turn, tables
of made-up times. No time is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktverify import _native
from ktverify.bench.kernels import measure, record, tunables, views
from ktverify.bench.kernels.record import KernelsLine, Line, OtherBitsLine, TimeLine, TunableCeilingLine, TunableLine
from ktverify.bench.kernels.tunables import Tunable
from tests.support.command_line import call, ends, refused
from tests.support.records import HEAD

EVERY = [one for isa in _native.known_isas() for one in tunables.tunables(isa)]


@pytest.mark.parametrize("tunable", EVERY, ids=lambda one: f"{one.isa}, {one.processors}: {one.name}")
def test_the_table_has_the_constants_that_the_sources_have(tunable: Tunable) -> None:
    assert tunable.today not in tunable.others
    sources = {tunable.changed(value) for value in (tunable.today, *tunable.others)}
    assert len(sources) == 1 + len(tunable.others)
    assert tunable.source.read_text(encoding="utf-8") in sources
    assert tunable.rows


def test_a_constant_that_moved_is_named() -> None:
    gone = Tunable("avx2", "gone", "avx2.cpp", "nowhere = {};", "8", ("4",), "nt", (1,))
    with pytest.raises(ValueError, match=r"avx2, gone: avx2.cpp has 'nowhere = 8;' 0 times, it takes 1"):
        gone.changed("4")


# ---- made-up times


def made_up(others: list[int], rounds: int = 12) -> list[Line]:
    """Today's choice takes 10 ms; the value "4" takes `others` in turn."""
    spot = TunableLine(number=0, tunable="chunk", today="8", product="nt", rows=16, bytes=1e8, flops=1e9)
    lines: list[Line] = [
        KernelsLine(**HEAD, isa="avx2", threads=2, n=64, k=32),
        spot,
        OtherBitsLine(number=0, value="3"),
    ]
    for number in range(rounds):
        times = {"8": 10, "4": others[number % len(others)]}
        lines += [TimeLine(number=0, round=number, value=value, ns=ms * 1_000_000) for value, ms in times.items()]
        lines.append(TunableCeilingLine(number=0, round=number, read=2e10, multiply=1e12))
    return lines


@pytest.mark.parametrize(
    ("others", "cell", "verdict"),
    [
        ([9], "0.90", "chunk, 16 rows: 4 instead of 8 takes 0.90 of the time (minima)"),
        ([9, 30], "0.90", "chunk, 16 rows: 4 instead of 8 takes 0.90 of the time (minima)"),
        ([12], "1.20", "no other value is better than today's by more than 5 % (minima)"),
        # a single fast round
        ([9, *[20] * 11], "too noisy to tell", "no other value is better than today's by more than 5 % (minima)"),
    ],
)
def test_a_better_value_is_named_where_the_rounds_tell(others: list[int], cell: str, verdict: str) -> None:
    view = views.view(made_up(others))
    assert view is not None
    assert view.verdict == verdict
    today, other = view.grids[0].rows
    assert today == ("8 (today)", "10.0", "10.0", "10.0", "10.0", "50 %", "100", "10 %", "2.00", "–")
    assert (other[0].partition(" ")[0], other[-1]) == ("4", cell)
    assert "FAIL 3: it computes other bits than today's choice" in view.grids[0].notes
    assert views.view(made_up(others)[:2]) is None, "a spot without a round is no result"


# ---- real kernels


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize(("backward", "rows"), [(False, 1), (False, 37), (False, 300), (True, 5), (True, 300)])
def test_every_instruction_set_multiplies_a_window(isa: str, backward: bool, rows: int) -> None:
    products, (table, _) = _native.Products(2, 1 << 20), _native.kernels_of(isa)
    sizes: dict[str, Any] = {"backward": backward, "rows": rows, "n": 96, "k": 64, "matrices": 3}
    found = [products.time(kernels=table, window=window, check=True, **sizes) for window in (0, 0, 40)]
    seconds, size, flops, bits = found[0]
    assert seconds > 0
    assert (size, flops) == (2 * 3 * 96 * 64, 2 * rows * 3 * 96 * 64)
    assert found[1][3] == bits, "the same window has the same results"
    assert found[2][3] != bits, "another window has other weights"
    alone = _native.Products(1, 1 << 20).time(kernels=table, window=0, check=True, **sizes)
    assert alone[3] == bits, "whichever worker computes"


@pytest.mark.parametrize(
    ("change", "wanted"), [({"rows": 0}, "0 rows"), ({"k": 48}, "96 x 48"), ({"matrices": 99}, "99 ")]
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], wanted: str) -> None:
    sizes: dict[str, Any] = {"backward": False, "rows": 4, "n": 96, "k": 64, "matrices": 1, **change}
    with pytest.raises(ValueError, match=wanted):
        _native.Products(1, 1 << 16).time(kernels=_native.kernels_of("scalar")[0], window=0, **sizes)


def test_a_run_compiles_and_times_other_values_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["bench", "kernels", "nt: k-blocks*", "--isa", "avx2", "--rounds", "2", "--size", "64x256", "--arena"]
    text = ends(call(*arguments, "0.1", "--out", str(out)), 0)
    assert "nt: k-blocks of a chunk: nt, 16 rows" in text
    lines = record.read(out)
    (chunk,) = [one for one in tunables.tunables("avx2") if one.name == "nt: k-blocks of a chunk"]
    times = [line for line in lines if isinstance(line, TimeLine) and line.number == 0]
    values = [chunk.today, *chunk.others]
    assert [(line.round, line.value) for line in times] == [(number, value) for number in range(2) for value in values]
    settings = measure.KernelSettings("avx2", 1, rounds=2)
    assert len(lines) - 2 == measure.KernelTimes(settings, [chunk]).count()
    assert ends(call("bench", "kernels", "--show", str(out)), 0) == text


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["no such"], "no tunable of .* is called no such; there are: nt"),
        (["--size", "64"], "--size is '64'"),
        (["--size", "64x33"], "64 x 33: it takes multiples of 32"),
        (["--size", "999999999x32"], "--size is '999999999x32'"),
        (["--size", "32768x65536"], "--arena is 1, and a matrix of --size 32768x65536 takes 4.0 GiB"),
        (["--arena", "1e6"], r"--arena 1e\+06 needs .* are available; take less"),
        (["--isa", "avx1024"], "isa='avx1024' is unknown"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments: list[str], wanted: str) -> None:
    refused(call("bench", "kernels", "--isa", "avx2", *arguments), wanted)
