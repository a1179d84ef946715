"""`bench shapes`: the order of turns, which engines get a time, what a time is compared with. Tiny shapes; no time is
judged."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktverify.bench import engines, record, shapes, summary, views
from ktverify.bench.measure import Bench
from ktverify.bench.record import BenchJournal, EngineLine, GroupOtherLoadLine, HeadLine, TurnLine
from ktverify.report.pages import view_markdown
from ktverify.spec.cases import Case
from ktverify.spec.names import BACKWARD_TENSORS
from ktverify.system.plausible import Work
from ktverify.system.timing import LoadReading
from tests.support.command_line import call, ends
from tests.support.shape_bench import ROUNDS, SETTINGS, SHAPE, Silent, head, measured, pretended, turns

PEER = """
import os
from ktverify.bench.peers.torch_loop import BACKWARD, HELD, LAZY, LORA, NEEDS, PACKAGE
from ktverify.engines.torch_bf16 import TorchBf16
TITLE = {title!r}
class Layer(TorchBf16):
    calls = 0
    def forward_sft(self, *inputs, save_for_backward):
        output = super().forward_sft(*inputs, save_for_backward=save_for_backward)
        self.calls += not save_for_backward
        {forward}
        return output
    def backward(self, grad_output):
        grad_input, grads = super().backward(grad_output)
        {backward}
        return grad_input, grads
def load(inputs):
    {load}
    return inputs.layer(Layer, copied=('gate_proj', 'up_proj', 'down_proj'))
"""
PEERS = {
    # after loading, checking and the warm-up, in the second round that counts
    "dies": {"forward": "if self.calls == 5: print('so it ends', flush=True); os.kill(os.getpid(), 11)"},
    "raises": {"load": "raise ValueError('not today')"},
    "cannot": {"load": "raise NotImplementedError('no training on this CPU')"},
    "has_no_backward": {"backward": "raise NotImplementedError('forwards only')"},
    # torch's, not the engine's
    "lacks_a_kernel": {"load": "import torch; torch.empty(1, device='meta').cpu()"},
    "wrong": {"forward": "output = output * 1.1"},
    "wrong_gradient": {"backward": "grad_input = grad_input * 0.9"},
    "forgets": {"backward": "grads.pop('grad_up_lora_a')"},
}
# after loading and checking it gives the output of its first call, whatever it is asked
PEERS_THAT_KEEP = {
    "keeps": {"forward": "self.kept = getattr(self, 'kept', output); output = output if self.calls < 3 else self.kept"}
}


def peer(folder: Path, name: str) -> str:
    """The path of a peer with one defect."""
    parts = {"forward": "", "backward": "", "load": "", **(PEERS | PEERS_THAT_KEEP)[name]}
    path = folder / f"{name}.py"
    path.write_text(PEER.format(title=f"the one that {name}", **parts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> BenchJournal:
    """One run over one shape with right, wrong, dying and missing engines."""
    folder = tmp_path_factory.mktemp("bench")
    found = engines.find(["torch_loop", *(peer(folder, name) for name in PEERS)], {})
    absent = pretended("absent", 1.0, missing="not installed")
    return measured(folder / "run", [*found, absent])


def engine_of(journal: BenchJournal, name: str) -> summary.EngineSummary:
    (found,) = summary.summarise(journal.lines)
    engine = found.engine(name)
    assert engine is not None
    return engine


def test_rounds_are_interleaved(journal: BenchJournal) -> None:
    every = [line for line in journal.lines if isinstance(line, TurnLine)]
    for number in range(ROUNDS):
        order = [(line.engine, line.what) for line in every if line.round == number]
        forward = [engine for engine, what in order if what == "forward"]
        alive = [*(["dies"] if number == 0 else []), "has_no_backward", "wrong_gradient", "forgets"]
        assert forward == ["native", "torch_loop", *alive], number
        step = ["native", "torch_loop", *(["dies"] if number == 0 else [])]
        assert order == [
            *((engine, "forward") for engine in forward),
            *((engine, what) for engine in step for what in ("forward_saving", "backward")),
        ], number
    ceilings = [line.round for line in journal.lines if isinstance(line, record.RoundCeilingLine)]
    assert ceilings == list(range(ROUNDS))


@pytest.mark.parametrize(
    ("name", "verdicts", "reason", "timed"),
    [
        ("dies", ("CRASH", "CRASH"), "in round 2: died of SIGSEGV; last line: so it ends", None),
        ("raises", ("CRASH", "CRASH"), "while loading: ValueError: not today", set()),
        ("cannot", ("UNSUPPORTED", "UNSUPPORTED"), "while loading: no training on this CPU", set()),
        ("has_no_backward", ("PASS", "UNSUPPORTED"), "backward: forwards only", {"forward"}),
        ("lacks_a_kernel", ("CRASH", "CRASH"), "while loading: NotImplementedError: Cannot copy", set()),
        ("wrong", ("FAIL", "FAIL"), "output is wrong: rel_l2 1.0e-01", set()),
        ("wrong_gradient", ("PASS", "FAIL"), "grad_input is wrong: rel_l2 1.0e-01", {"forward"}),
        ("forgets", ("PASS", "FAIL"), "grad_up_lora_a is missing", {"forward"}),
        ("absent", ("SKIP", "SKIP"), "not installed", set()),
    ],
)
def test_a_defect_costs_only_the_time_that_it_makes_worthless(
    journal: BenchJournal, name: str, verdicts: tuple[str, str], reason: str, timed: set[str] | None
) -> None:
    engine = engine_of(journal, name)
    assert (engine.line.forward, engine.line.backward) == verdicts
    assert engine.line.reason.startswith(reason)
    if timed is not None:
        assert {line.what for line in turns(journal, name)} == timed
    assert set(engine.timings) == (timed or set())
    (found,) = summary.summarise(journal.lines)
    word = verdicts[0] if verdicts[0] != "PASS" else verdicts[1]
    assert [line for line in views.problems(found) if line.startswith(f"{word} {engine.line.title}: {reason}")]


@pytest.mark.parametrize("name", ["native", "torch_loop"])
def test_right_engines_are_timed_in_every_round(journal: BenchJournal, name: str) -> None:
    engine = engine_of(journal, name)
    assert (engine.line.forward, engine.line.backward) == ("PASS", "PASS")
    assert list(engine.timings) == ["forward", "forward_saving", "backward"]
    for timing in engine.timings.values():
        assert timing.ms.count == ROUNDS
        assert timing.over_roofline is not None
    # and were compared with the oracle before
    assert set(engine.line.rel_l2) == {"output", *BACKWARD_TENSORS}
    assert 0 < max(engine.line.rel_l2.values()) < 1e-2
    assert name != "native" or engine.line.about["isa"]


def test_an_engine_that_keeps_results_is_wrong_in_the_rounds(tmp_path: Path) -> None:
    """Each call has the tokens in another order, and some of the timed results are compared."""
    engine = engine_of(measured(tmp_path, engines.find([peer(tmp_path, "keeps")], {})), "keeps")
    assert (engine.line.forward, engine.line.backward, engine.timings) == ("FAIL", "FAIL", {})
    assert engine.line.reason.startswith("in round ")
    assert "output is wrong" in engine.line.reason


@pytest.mark.parametrize(
    ("ms", "cache", "verdict"),
    # the roofline time of the best round is 50 ms
    [(44, 0, "MISTRUSTED"), (46, 0, "PASS"), (44, 500_000, "PASS"), (1, None, "PASS")],
)
def test_a_time_that_the_machine_cannot_have_is_mistrusted(ms: int, cache: int | None, verdict: str) -> None:
    machine = None if cache is None else head([]).model_copy(update={"cache_bytes": cache})
    found = summary_of([100] * 12, [ms] * 12, [80.0, 50.0, 60.0], machine)
    engine = found.engine("peer")
    assert engine is not None
    assert engine.line.forward == verdict
    assert set(engine.timings) == (set() if verdict == "MISTRUSTED" else {"forward"})
    figures = "MISTRUSTED peer: forward: 44 ms cannot be true: 0.001 GB at 0.02 GB/s and 1e-09 GFLOP at "
    assert [line for line in views.problems(found) if line.startswith(figures)] == views.problems(found)
    assert bool(views.problems(found)) == (verdict == "MISTRUSTED")


def test_a_run_reads_back_and_every_printer_takes_it(journal: BenchJournal) -> None:
    assert record.read(journal.directory) == journal.lines
    (quiet,) = [line for line in journal.lines if isinstance(line, GroupOtherLoadLine)]
    assert 0 <= quiet.others <= 1
    found = summary.summarise(journal.lines)
    first = journal.lines[0]
    assert isinstance(first, HeadLine)
    assert views.draw([]) is None
    view = views.view(first, found)
    assert (view.picture or b"").startswith(b"\x89PNG")
    page = view_markdown(view)
    wanted = ("| native ", "| torch loop ", "CRASH the one that dies: in round 2", " SKIP |", "## forward")
    assert not [text for text in wanted if text not in page]
    shown = ends(call("bench", "--show", str(journal.directory)), 0)
    assert "in round 2: died of SIGSEGV" in shown
    html = (journal.directory / "bench.html").read_text()
    for text in (">torch loop</td>", "CRASH the one that dies: in round 2", "times the roofline", "data:image/png"):
        assert text in html, text
    with (journal.directory / "bench.tsv").open(newline="") as file:
        timed = {(row["engine"], row["what"]) for row in csv.DictReader(file, delimiter="\t")}
    assert {("native", "backward"), ("torch_loop", "forward"), ("wrong_gradient", "forward")} <= timed
    assert ("wrong_gradient", "backward") not in timed


def test_ratios_are_of_minima(journal: BenchJournal) -> None:
    mine, peers = (
        [line.ns for line in turns(journal, name) if line.what == "backward"] for name in ("native", "torch_loop")
    )
    timing = engine_of(journal, "torch_loop").timings["backward"]
    assert timing.against_own is not None
    assert timing.against_own.value == pytest.approx(min(peers) / min(mine))


def summary_of(
    native: list[int], peer: list[int], ceilings: list[float], machine: HeadLine | None = None
) -> summary.ShapeSummary:
    """Of times in ms; a ceiling is the roofline time in ms."""
    work: dict[str, Any] = {"forward_bytes": 1e6, "forward_flops": 1, "backward_bytes": 1, "backward_flops": 1}
    verdicts: dict[str, Any] = {"forward": "PASS", "backward": "UNSUPPORTED"}
    names = {"native": native, "peer": peer}
    lines: list[record.Line] = [
        *([machine] if machine is not None else []),
        record.ShapeLine(shape="s", why="", case=SHAPE.case.id, active=4, weight_bytes=1, **work),
        *(EngineLine(shape="s", run=1, group=0, engine=name, title=name, **verdicts) for name in names),
        *(
            TurnLine(shape="s", run=1, group=0, round=number, engine=name, what="forward", ns=ms * 1_000_000)
            for name, times in names.items()
            for number, ms in enumerate(times)
        ),
        *(
            record.RoundCeilingLine(shape="s", run=1, group=0, round=number, isa="x", read=1e9 / ms, multiply=1e15)
            for number, ms in enumerate(ceilings)
        ),
    ]
    (found,) = summary.summarise(lines)
    return found


@pytest.mark.parametrize(
    ("native", "peer", "cell"),
    [
        # a neighbour that takes half of the rounds leaves the minima as they are
        ([100] * 6 + [400] * 6, [120] * 6 + [480] * 6, "1.20"),
        ([100] * 6 + [400] * 6, [90] * 6 + [360] * 6, "0.90"),
        # one lucky round is no difference
        ([100] + [200] * 11, [120] * 12, "too noisy to tell"),
        ([100] * 12, [80] + [100] * 11, "too noisy to tell"),
        # of few rounds, all count
        ([100, 130], [120, 120], "too noisy to tell"),
        ([100, 110], [120, 120], "1.20"),
    ],
)
def test_a_difference_within_the_spread_of_the_rounds_is_too_noisy_to_tell(
    native: list[int], peer: list[int], cell: str
) -> None:
    found = summary_of(native, peer, [50.0, 80.0])
    assert views.overview_grid([found], "forward").rows[0][-1] == cell
    (row,) = (row for row in views.shape_grid(found).rows if row[0] == "peer")
    assert row[5] == cell


def test_the_roofline_is_that_of_the_best_round() -> None:
    found = summary_of([100] * 12, [120] * 12, [80.0, 50.0, 60.0])
    assert views.overview_grid([found], "forward").rows[0][1:6] == ("50.0", "100", "100", "100", "2.00")
    assert views.verdict([found]) == "forward 2.00 times the roofline (minima)"
    assert "reading 0.0200 (median 0.0167) GB/s" in views.shape_grid(found).notes[1]
    assert views.rows([found])[1]["x_native_spread"] == 0.0


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path) -> None:
    class Impatient(Silent):
        steps = 0

        def advance(self) -> None:
            self.steps += 1
            # one engine loaded, one warm-up, two rounds
            if self.steps == 4:
                raise KeyboardInterrupt

    written = BenchJournal(tmp_path / "run")
    written.add(head(["native"]))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(KeyboardInterrupt):
        Bench(engines.find(["native"], {}), replace(SETTINGS, scratch=scratch), written, Impatient()).measure(SHAPE)
    written.close()
    assert record.read(tmp_path / "run") == written.lines
    assert engine_of(written, "native").timings["backward"].ms.count == 2
    assert not list(scratch.iterdir())


# ---- the roofline


def products(case: Case) -> list[tuple[int, int, int]]:
    """(rows, in, out) of every product of one forward, base and LoRA apart, counted from docs/contract.md."""
    rows, h, i, r = case.qlen * case.top_k, case.hidden, case.intermediate, case.rank
    base = [(rows, h, i), (rows, h, i), (rows, i, h)]
    return [*base, (rows, h, r), (rows, r, i), (rows, h, r), (rows, r, i), (rows, i, r), (rows, r, h)]


def test_the_roofline_counts_the_contracts_products() -> None:
    case = Case.parse("E=16,k=8,H=7168,I=2048,T=128,r=16")
    every = [2 * rows * k * n for rows, k, n in products(case)]
    forward, backward = shapes.forward_work(case, 16), shapes.backward_work(case, 16)
    assert forward.flops == sum(every)
    # the gradient of the input of all nine; that of the weight only where it is trained
    assert backward.flops == sum(every) + sum(every[3:])
    assert forward.bytes == backward.bytes == 16 * 3 * 7168 * 2048 * 2
    # experts that no token reaches are not read
    assert shapes.forward_work(case, 4).bytes == forward.bytes / 4


@pytest.mark.parametrize(("rate", "seconds", "bound"), [(1e12, 0.5, "memory"), (1e11, 1.0, "arithmetic")])
def test_the_roofline_is_the_slower_of_reading_and_multiplying(rate: float, seconds: float, bound: str) -> None:
    work = Work(bytes=1e10, flops=1e11)
    assert work.seconds(2e10, rate) == pytest.approx(seconds)
    assert work.bound(2e10, rate) == bound


def test_every_shape_of_the_table_is_a_case_that_repro_takes() -> None:
    found = shapes.shapes()
    assert len(found) == 9
    for shape in found.values():
        assert Case.parse(shape.case.id).spec == shape.case.spec
        assert len(shape.why) > 20


# ---- other programs


def turn(round_: int, ns: int, others: float) -> TurnLine:
    return TurnLine(shape="s", run=1, group=0, round=round_, engine="native", what="forward", ns=ns, others=others)


@pytest.mark.parametrize(("quiet", "median"), [(6, 1.0), (4, 9.0)])
def test_disturbed_turns_do_not_count_if_enough_others_remain(quiet: int, median: float) -> None:
    work: dict[str, Any] = {"forward_bytes": 1, "forward_flops": 1, "backward_bytes": 1, "backward_flops": 1}
    verdicts: dict[str, Any] = {"forward": "PASS", "backward": "UNSUPPORTED"}
    lines: list[record.Line] = [
        record.ShapeLine(shape="s", why="", case=SHAPE.case.id, active=4, weight_bytes=1, **work),
        EngineLine(shape="s", run=1, group=0, engine="native", title="native", **verdicts),
        *(turn(number, 1_000_000, 0.0) for number in range(quiet)),
        *(turn(number, 9_000_000, 0.5) for number in range(quiet, 15)),
    ]
    (found,) = summary.summarise(lines)
    assert found.engines[0].timings["forward"].ms.median == median
    assert found.left_out == (15 - quiet if median == 1.0 else 0)


def test_the_share_of_others() -> None:
    processors = os.cpu_count() or 1
    start = LoadReading(10.0, 100.0)
    assert start.share_until(LoadReading(11.0, 100.02 + processors / 2)) == pytest.approx(0.5)
    assert start.share_until(LoadReading(11.0, 100.0)) == 0
    assert start.share_until(LoadReading(11.0, 200.0)) == 1
