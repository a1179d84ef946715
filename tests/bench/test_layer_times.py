"""`bench layer` and `bench sweep`: which process measures what, the tables of made-up times, how a timed run ends. No
time is judged."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ktverify.bench import timed_run
from ktverify.bench.layer import measure, record, views
from ktverify.bench.layer.record import LayerLine, MemoryLine, RepeatLine, Spot, SpotLine, SpotOtherLoadLine, Varied
from ktverify.bench.layer.views import BACKWARD, BOTH, DIFFERENCE, FORWARD, WHATS, summarise
from ktverify.bench.shapes import weight_bytes
from ktverify.cli.bench_layer import _doubling
from ktverify.cli.main import BENCH, BENCH_DEFAULT
from ktverify.errors import NothingMeasured
from ktverify.isolation import process
from ktverify.isolation.interrupt import INTERRUPTED
from ktverify.report.grid import delimited
from ktverify.report.pages import View
from ktverify.spec.cases import Case
from tests.support.command_line import TINY, call, ends, refused
from tests.support.records import HEAD

MS = 1_000_000
CASE = Case.parse(TINY)


def made_up_spot(spot: Spot, both: int) -> list[record.Line]:
    """Two repeats: forward 2 and 4 ms, both `both` ms, saving 3 ms, backward 5 ms; and one that does not count."""
    found = SpotLine(
        number=spot.number, isa="scalar", workers=2, weights=1 << 20, flops=1e6 * spot.value, first_ns=9 * MS,
        rel_l2={"output": 2e-3},
    )  # fmt: skip
    lines: list[record.Line] = [found]
    for repeat, forward in ((-1, 100), (0, 2), (1, 4)):
        ms = {"forward": forward, "both": both, "saving": 3, "backward": 5}
        ns: dict[str, Any] = {f"{name}_ns": value * MS for name, value in ms.items()}
        lines.append(RepeatLine(number=spot.number, repeat=repeat, **ns))
    memory = MemoryLine(number=spot.number, loaded=1 << 20, packed=2 << 20, first_step=3 << 20, last_step=3 << 20)
    return [*lines, memory]


def made_up(spots: list[Spot]) -> list[record.Line]:
    head = LayerLine(**HEAD, case=TINY, spots=tuple(spots))
    return [head, *(line for spot in spots for line in made_up_spot(spot, 10 * spot.value))]


def view_of(lines: list[record.Line]) -> View:
    view = views.view(lines)
    assert view is not None
    return view


def spots_of(*values: tuple[Varied, int]) -> list[Spot]:
    return [
        Spot(number=number, varied=varied, value=value, case=TINY, tp=value if varied == "tp" else 1)
        for number, (varied, value) in enumerate(values)
    ]


def test_backward_is_timed_and_found_by_subtraction() -> None:
    (one,) = summarise(made_up(spots_of(("tp", 1))))
    minima = {what: one.ms[what].min for what in WHATS}
    assert minima == {FORWARD: 2.0, BOTH: 10.0, "forward that saves": 3.0, BACKWARD: 5.0, DIFFERENCE: 7.0}
    assert one.tokens_per_s(BOTH) == pytest.approx(CASE.qlen / 0.01)


def test_a_sweep_names_what_it_varies_and_labels_have_a_background() -> None:
    summaries = summarise(made_up(spots_of(("rank", 4), ("rank", 8), ("tp", 1), ("tp", 2))))
    axes = Figure().subplots(1, 3)
    views._cost(axes[0], summaries[:2])
    assert axes[0].get_xlabel() == "LoRA rank"
    views._spread(axes[1], summaries[2])
    views._degrees(axes[2], summaries[2:])
    for panel in axes[1:]:
        assert panel.texts
        assert all(text.get_bbox_patch().get_facecolor() == (1, 1, 1, 1) for text in panel.texts)


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ([], ""),
        ([1], "other programs had 50 % of the processors at TP 2: these times mean little"),
        ([1, 2], "other programs had up to 50 % of the processors at TP 2, batch 1 x 17: these times mean little"),
        ([0, 1, 2], "other programs had up to 50 % of the processors: these times mean little"),
        ([None], "other programs had up to 50 % of the processors: these times mean little"),
    ],
)
def test_a_note_names_the_times_that_other_programs_disturbed(numbers: list[int | None], wanted: str) -> None:
    quiet = [SpotOtherLoadLine(number=number, others=0.01) for number in range(3)]
    busy = [SpotOtherLoadLine(number=number, others=0.5) for number in numbers]
    view = view_of([*made_up(spots_of(("tp", 1), ("tp", 2), ("throughput", CASE.qlen))), *quiet, *busy])
    assert view.warning == wanted
    assert [row["others"] == 0.5 for row in view.rows[:: len(WHATS)]] == [
        None in numbers or number in numbers for number in range(3)
    ]


def test_tables_of_made_up_times() -> None:
    view = view_of(made_up(spots_of(("tp", 1), ("tp", 2), ("throughput", CASE.qlen))))
    times, degrees, throughput, memory = view.grids
    assert times.rows[0] == ("forward", "2.00", "2.20", "3.00", "3.90", "4.00", "3.00 ± 1.41", "8,500")
    # forward took 2 and 4 ms at both degrees
    noisy = ("2.00", "2.20", "3.00", "too noisy to tell")
    assert degrees.rows[1] == ("TP 2", "2", *noisy, "20.0", "20.0", "20.0", "0.50")
    assert throughput.rows == (("batch 1 x 17", "17", "2.00", "2.20", "3.00", "8,500", "170", "170", "170", "100"),)
    assert memory.rows[0] == ("TP 1", "1.0 MiB", "1.0 MiB", "2.0 MiB", "3.0 MiB", "3.0 MiB", "0 B", "3.00")
    assert view.verdict == "forward 2.00 ms, forward + backward 10.0 ms, backward 5.00 ms, 1,700 tokens/s (minima)"
    assert len(delimited(view.rows).splitlines()) == 1 + 3 * len(WHATS)
    assert (view.picture or b"").startswith(b"\x89PNG")


def test_a_sweep_shows_growth_beside_that_of_the_work() -> None:
    view = view_of(made_up(spots_of(("qlen", 1), ("qlen", 4), ("rank", 8))))
    qlen, rank = view.grids
    growth = qlen.headings.index("growth")
    assert [(row[0], *row[growth : growth + 2]) for row in qlen.rows] == [("1", "1.00", "1.00"), ("4", "4.00", "4.00")]
    assert [row[0] for row in rank.rows] == ["8"]
    assert view.verdict == "qlen 1 to 4: 4.00 times the time (minima)"


def test_a_stopped_run_shows_the_spots_that_it_has() -> None:
    spots = spots_of(("qlen", 1), ("qlen", 4))
    lines = made_up(spots)
    view = view_of(lines[:5])  # the head, and the first spot without its memory
    assert [row[0] for row in view.grids[0].rows] == ["1"]
    assert view.grids[0].rows[0][-1] == "–"
    assert views.view(lines[:3]) is None, "a warm-up is no time"


# ---- a real layer


@pytest.fixture(scope="module")
def lines() -> list[record.Line]:
    return list(measure.spot_lines(Spot(number=7, case=TINY, threads=1, warmup=1, repeats=2, steps=2)))


def test_a_spot_has_all_its_lines(lines: list[record.Line]) -> None:
    assert [line.kind for line in lines] == ["spot", *["repeat"] * 3, "quiet", "memory"]
    assert len(lines) == measure.line_count([Spot(case=TINY, warmup=1, repeats=2)])
    found, memory = lines[0], lines[-1]
    assert isinstance(found, SpotLine)
    assert (found.number, found.workers, found.weights) == (7, 1, weight_bytes(CASE, 4))
    assert set(found.rel_l2) == {"output", "grad_input"}
    assert all(0 < error < 1e-2 for error in found.rel_l2.values())
    assert isinstance(memory, MemoryLine)


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from ktverify.engines.native.layer import KTMoEWrapper

    honest = KTMoEWrapper.forward_sft
    monkeypatch.setattr(KTMoEWrapper, "forward_sft", lambda self, *args, **kw: 1.1 * honest(self, *args, **kw))
    with pytest.raises(RuntimeError, match=r"output is wrong: rel_l2 1\.0e-01, .* a wrong result gets no time"):
        measure.MeasuredLayer(Spot(case=TINY, threads=1)).check()


def test_every_degree_and_every_batch_has_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Spot] = []

    def lines_of(module: str, spot: Spot) -> Iterator[str]:
        assert module == measure.__name__
        asked.append(spot)
        yield from (line.model_dump_json() for line in made_up_spot(spot, 10))

    monkeypatch.setattr(process, "lines_of", lines_of)
    out = tmp_path / "run"
    arguments = ("bench", "layer", TINY, "--tp", "2,4", "--batch_sizes", "1,2", "--sequence-lengths", "8,16")
    text = ends(call(*arguments, "--out", str(out)), 0)
    assert [(spot.tp, Case.parse(spot.case).qlen, spot.batch) for spot in asked] == [
        (1, 17, 1), (2, 17, 1), (4, 17, 1), (1, 8, 1), (1, 16, 1), (1, 16, 2), (1, 32, 2),
    ]  # fmt: skip
    assert "2 x 16" in text
    assert {path.name for path in out.iterdir()} == {f"layer.{end}" for end in ("jsonl", "md", "html", "tsv", "png")}
    assert ends(call("bench", "layer", "--show", str(out)), 0) == text
    assert ends(call("bench", "layer", "--show", str(out), "--json"), 0) == (out / record.FILE).read_text()
    asked.clear()
    ends(call("bench", "sweep", "rank", "threads", "--case", TINY, "--out", str(tmp_path / "sweep")), 0)
    ranks = [(Case.parse(spot.case).rank, Case.parse(spot.case).alpha) for spot in asked if spot.varied == "rank"]
    assert ranks == [(rank, 2.0 * rank) for rank in (4, 8, 16, 32, 64)]
    assert next(spot.threads for spot in asked if spot.varied == "threads") == 1


def test_sweep_command_through_a_real_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = f"--values 5 --case {TINY} --repeats 1 --warmup 0 --steps 0 --threads 1 --out {out}"
    assert "over qlen" in ends(call("bench", "sweep", "qlen", *options.split()), 0)
    assert [line.kind for line in record.read(out)] == ["layer", "spot", "repeat", "quiet", "memory"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("layer", TINY, "--tp", "3"), "tp degree 3 does not divide I = 32"),
        (("layer", TINY, "--tp", "1,x"), "--tp is '1,x', it takes whole numbers from 1 on"),
        (("layer", TINY.replace("T=17", "T=0")), "T is 0"),
        (("layer", TINY.replace("alpha=16", "data=integer,alpha=16")), "takes data=gaussian"),
        (("layer", "E=4096,k=2,H=7168,I=2048,T=17,r=8"), "needs 672.0 GiB for its weights"),
        (("sweep", "width"), "nothing that can be varied is called 'width'; there are qlen, rank"),
        (("sweep", "--values", "1,2"), "--values is for one of"),
        (("sweep", "threads", "--values", "4096"), "--values has 4096 threads, this process may run on"),
        (("sweep", "experts", "--case", TINY, "--values", "1"), "k is 2, it takes at most E = 1"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments: tuple[str, ...], wanted: str) -> None:
    refused(call("bench", *arguments), wanted)


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "profile.jsonl").touch()
    wanted = "has no layer.jsonl, which this command wrote; it has profile.jsonl"
    refused(call("bench", "layer", "--show", str(tmp_path)), wanted)


@pytest.mark.parametrize("stopped", [True, False])
def test_only_a_stopped_run_may_have_no_result(stopped: bool, tmp_path: Path) -> None:
    def lines() -> Iterator[timed_run.OtherLoadLine]:
        yield timed_run.OtherLoadLine(others=0.0)
        if stopped:
            raise KeyboardInterrupt

    def run(error: Exception) -> int:
        def conclude(directory: Path, lines: list[object]) -> bool:
            raise error

        out = tmp_path / type(error).__name__
        return timed_run.measure("layer", "lines.jsonl", timed_run.RunLine, lines(), 1, conclude, out)

    with pytest.raises(ValueError, match="drawing"):
        run(ValueError("drawing"))
    with contextlib.nullcontext() if stopped else pytest.raises(NothingMeasured):
        assert run(NothingMeasured("no repeat")) == INTERRUPTED


def test_values_double_up_to_the_last() -> None:
    assert _doubling(1, 6) == [1, 2, 4, 6]
    assert _doubling(4, 16) == [4, 8, 16]
    assert _doubling(3, 3) == [3]


@pytest.mark.parametrize("command", BENCH)
def test_every_bench_command_explains_itself_with_an_example(command: str) -> None:
    text = ends(call("bench", command, "--help"), 0)
    # the default command is called without its name
    name = "bench" if command == BENCH_DEFAULT else f"bench {command}"
    assert re.search(rf"Examples?:\s+python -m ktverify {name}", text)
    # an explanation may begin on the line below
    for option in re.findall(r"^  --.*(?:\n {8,}.*)*", text.partition("Options:")[2], re.MULTILINE):
        assert re.search(r"\s{2,}[a-zA-Z0-9(]", option.strip()), f"option without an explanation: {option}"
