"""Goldens: complete, small, stable, whole after a kill; sketches tell a distance within 10 %."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ktverify.cli.golden import app
from ktverify.errors import NoGolden
from ktverify.judge import golden
from ktverify.judge.golden_sketch import Sketch, compare_sketch, make_sketch
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward
from ktverify.spec.cases import Case, catalogue, select
from ktverify.spec.inputs import inputs_sha256, make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
ONLY = "one_token_odd,odd_sizes,exact_masked,nan_row,no_token,fresh_adapter,small"
FEW = [case.name for case in select(ONLY)]


def command(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ktverify.golden", "regenerate", "--dir", str(directory), *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few goldens, made here. Tests that change them copy the directory."""
    directory = tmp_path_factory.mktemp("golden")
    golden.regenerate(ONLY, directory=directory)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "golden"
    directory.mkdir()
    for name, data in content(made).items():
        (directory / name).write_bytes(data)
    return directory


# ---- what is committed


@pytest.mark.parametrize("case", catalogue().values(), ids=lambda case: case.name)
def test_every_row_has_its_golden(case: Case) -> None:
    kept = golden.load(case)
    assert set(kept.tensors) == set(kept.peer) == set(ALL_TENSORS)
    if case.exact:
        assert {tensor.kind for tensor in kept.tensors.values()} == {"full"}


@pytest.mark.parametrize("case", select(tier="default"), ids=lambda case: case.name)
def test_committed_inputs_are_this_generators(case: Case) -> None:
    assert golden.load(case).inputs_sha256 == inputs_sha256(make_inputs(case))


def test_committed_goldens_are_small_and_complete() -> None:
    directory = golden.golden_dir()
    files = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    assert sum(files.values()) <= 30e6
    manifest = json.loads((directory / golden.MANIFEST).read_text(encoding="utf-8"))
    named = {entry["file"] for entry in manifest["cases"].values()}
    assert named == {name for name in files if name.endswith(".safetensors")}
    assert set(manifest["cases"]) == {case.id for case in catalogue().values()}


def test_the_manifest_tells_what_a_reader_needs() -> None:
    manifest = json.loads((golden.golden_dir() / golden.MANIFEST).read_text(encoding="utf-8"))
    for entry in manifest["cases"].values():
        assert set(entry) >= {"case", "generator", "torch", "inputs_sha256", "file", "file_sha256", "tensors"}
        for tensor in entry["tensors"].values():
            assert set(tensor) >= {"shape", "kind", "sha256", "peer"}


# ---- what a golden says


@pytest.mark.parametrize("name", FEW)
def test_a_golden_is_the_oracle(made: Path, name: str) -> None:
    case = catalogue()[name]
    kept = golden.load(case, made)
    expected = forward_backward(make_inputs(case))
    for tensor in ALL_TENSORS:
        rounded = expected[tensor].to(torch.float32 if tensor == GRAD_WEIGHTS else torch.bfloat16)
        right = kept.compare(tensor, rounded)
        live = compare(rounded, expected[tensor])
        assert right.numel == live.numel
        assert (right.non_finite, right.missing_non_finite, right.stray) == (0, 0, 0)
        if right.estimated:
            assert right.rel_l2 == pytest.approx(live.rel_l2, rel=0.1)
        elif case.exact:
            assert (right.rel_l2, right.mismatched) == (0.0, 0)
        else:
            assert right.rel_l2 == pytest.approx(live.rel_l2, rel=1e-3, abs=1e-7)
        if live.norm_expected:
            doubled = kept.compare(tensor, 2 * rounded)
            assert doubled.rel_l2 == pytest.approx(1, rel=0.1)


def test_other_shapes_and_names_are_refused(made: Path) -> None:
    kept = golden.load(catalogue()["odd_sizes"], made)
    with pytest.raises(ValueError, match=r"shape is \[33, 96\], expected \[33, 97\]"):
        kept.compare("output", torch.zeros(33, 96))
    with pytest.raises(KeyError):
        kept.compare("grad_bias", torch.zeros(1))


def test_zero_tensors_take_no_room_and_are_still_looked_at(made: Path) -> None:
    kept = golden.load(catalogue()["fresh_adapter"], made)
    assert kept.tensors["grad_gate_lora_a"].kind == "zero"
    wrong = torch.zeros(4, 8, 128)
    assert kept.compare("grad_gate_lora_a", wrong).rel_l2 == 0
    wrong[2, 1, 1] = 1e-12
    found = kept.compare("grad_gate_lora_a", wrong)
    assert (found.stray, found.worst_index, found.rel_l2) == (1, (2, 1, 1), math.inf)


def test_only_the_row_itself_has_a_golden(made: Path) -> None:
    small = catalogue()["small"]
    golden.load(small, made)
    for other in (small.with_seed(1), Case.parse("small,T=31"), Case.parse("E=2,k=1,H=8,I=8,T=2,r=1")):
        with pytest.raises(NoGolden, match="regenerate"):
            golden.load(other, made)
    with pytest.raises(FileNotFoundError):
        golden.load(small, made / "nowhere")


# ---- making them


def test_twice_is_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    # in a process of its own: nothing may hang on what this one has computed before
    first = command("--only", ONLY, directory=again)
    assert (first.returncode, first.stderr) == (0, "")
    assert f"0 goldens unchanged, {len(FEW)} written" in first.stdout
    assert content(again) == content(made)
    assert len(golden.regenerate(ONLY, directory=again, force=True).made) == len(FEW)
    assert content(again) == content(made)
    assert len(golden.regenerate(ONLY, directory=again).kept) == len(FEW)
    assert content(again) == content(made)


def edit(directory: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    path = directory / golden.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest["cases"])
    path.write_text(json.dumps(manifest), encoding="utf-8")


def spoil_file(directory: Path) -> None:
    path = next(directory.glob("odd_sizes.*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def spoil_value(directory: Path) -> None:
    """A golden that is whole, but of other values: the oracle's, off by 1e-6."""
    case = catalogue()["odd_sizes"]
    made, _ = golden._make(case)
    wrong = {
        name: (
            golden.Kept(kept.shape, kept.kind, kept.sha256, kept.value * (1 + 1e-6))
            if name == "grad_input" and isinstance(kept.value, torch.Tensor)
            else kept
        )
        for name, kept in made.tensors.items()
    }
    entry = golden._write(golden.Golden(case, made.inputs_sha256, made.torch_version, wrong, made.peer), directory)
    edit(directory, lambda cases: cases.update({case.id: entry}))


ODD = "odd_sizes@seed=0"
DRIFTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a golden is missing": (lambda d: edit(d, lambda c: c.pop(ODD)), "odd_sizes@seed=0: has no golden"),
    "a file is missing": (lambda d: next(d.glob("odd_sizes.*")).unlink(), "is missing"),
    "a file is damaged": (spoil_file, "is not what the manifest says"),
    "a value is off by 1e-6": (spoil_value, "grad_input differs by rel_l2 9.5e-07"),
    "inputs changed": (
        lambda d: edit(d, lambda c: c[ODD].update(inputs_sha256="0" * 64)),
        "the golden was made of 000000000000",
    ),
    "the generator changed": (lambda d: edit(d, lambda c: c[ODD].update(generator=0)), "made by generator 0"),
    "the row changed": (lambda d: edit(d, lambda c: c[ODD].update(case="E=4")), "was E=4, is E=5,k=2"),
    "the peer changed": (
        lambda d: edit(d, lambda c: c[ODD]["tensors"]["output"].update(peer=1e-2)),  # type: ignore[index]
        "output: the plain bf16 peer errs by",
    ),
}


@pytest.mark.parametrize("what", DRIFTS)
def test_check_names_what_drifted_and_writes_nothing(copy: Path, what: str) -> None:
    spoil, says = DRIFTS[what]
    spoil(copy)
    before = content(copy)
    drift = golden.regenerate("odd_sizes", directory=copy, check=True)
    assert [line for line in drift.lines if says in line], drift.lines
    assert drift.made == [ODD]
    assert content(copy) == before
    # and a regeneration heals it
    golden.regenerate("odd_sizes", directory=copy)
    assert golden.regenerate("odd_sizes", directory=copy, check=True).lines == []


def test_check_exits_1(copy: Path) -> None:
    arguments = ["regenerate", "--dir", str(copy), "--only", "odd_sizes,no_token", "--check"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    spoil_file(copy)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "drifted: odd_sizes@seed=0" in result.output
    assert "1 goldens unchanged, 1 drifted" in result.output


def test_last_bits_of_another_machine_change_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = forward_backward
    monkeypatch.setattr(
        golden, "forward_backward", lambda inputs: {n: v * (1 + 1e-13) for n, v in real(inputs).items()}
    )
    before = content(copy)
    assert golden.regenerate("odd_sizes,small", directory=copy).made == []
    assert content(copy) == before
    monkeypatch.setattr(golden, "forward_backward", lambda inputs: {n: v * 1.00001 for n, v in real(inputs).items()})
    assert golden.regenerate("odd_sizes,small", directory=copy).made == ["small@seed=0", ODD]


def test_rows_that_are_gone_go(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {name: catalogue()[name] for name in ("small", "odd_sizes")}
    monkeypatch.setattr(golden, "catalogue", lambda: left)
    monkeypatch.setattr(golden, "select", lambda only: list(left.values()))
    drift = golden.regenerate(directory=copy)
    assert len([line for line in drift.lines if "no row of the catalogue" in line]) == len(FEW) - 2
    assert sorted(path.name.split(".")[0] for path in copy.glob("*.safetensors")) == ["odd_sizes", "small"]


def test_a_glob_leaves_the_others_alone(copy: Path) -> None:
    before = content(copy)
    golden.regenerate("odd_sizes", directory=copy, force=True)
    assert content(copy) == before


@pytest.mark.parametrize("moment", ["computing", "staged", "files moved", "manifest replaced"])
def test_killed_at_any_moment_the_old_goldens_are_whole(copy: Path, moment: str) -> None:
    """SIGKILL, at the moment when the step of that name is done; then the old set, or the new one, loads whole."""
    edit(copy, lambda cases: cases[ODD].update(inputs_sha256="1" * 64))
    edit(copy, lambda cases: cases["small@seed=0"].update(inputs_sha256="1" * 64))
    before = content(copy)
    script = f"""
import os, signal, sys
from pathlib import Path
from ktverify.judge import golden as store
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
moment = {moment!r}
if moment == "computing":
    make, seen = store._make, []
    def _make(case):
        seen.append(case)
        return make(case) if len(seen) < 2 else die()
    store._make = _make
elif moment == "staged":
    store._publish = lambda *_: die()
elif moment == "files moved":
    write = store.write_whole
    store.write_whole = lambda path, content: die() if path.name == "manifest.json" else write(path, content)
else:
    write = store.write_whole
    def write_whole(path, content):
        write(path, content)
        if path.name == "manifest.json":
            die()
    store.write_whole = write_whole
store.regenerate("odd_sizes,small", directory=Path({str(copy)!r}), force=True)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    after = content_of_files(copy)
    if moment != "manifest replaced":
        assert {name: after[name] for name in before} == before
    for name in FEW:
        golden.load(catalogue()[name], copy)
    # what the killed process left is cleared, and nothing but the goldens stays
    golden.regenerate(ONLY, directory=copy)
    manifest = json.loads((copy / golden.MANIFEST).read_text(encoding="utf-8"))
    assert set(content(copy)) == {golden.MANIFEST, *(entry["file"] for entry in manifest["cases"].values())}


def content_of_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_kill_from_outside(copy: Path) -> None:
    """The real thing: a regeneration of everything, shot while it works."""
    before = content(copy)
    line = [
        sys.executable,
        "-m",
        "ktverify.golden",
        "regenerate",
        "--dir",
        str(copy),
        "--force",
        "--only",
        "r*,t*",
    ]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not list(copy.glob(".staging-*/*")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert content_of_files(copy) == before
    for name in FEW:
        golden.load(catalogue()[name], copy)


def test_two_at_once_are_refused(copy: Path) -> None:
    with golden._alone(copy), pytest.raises(ValueError, match="another process regenerates"):
        golden.regenerate("small", directory=copy)


@pytest.mark.parametrize("only", ["no_such_*", "small@seed=3", "E=2,k=1,H=8,I=8,T=2,r=1"])
def test_what_is_no_row_is_refused(tmp_path: Path, only: str) -> None:
    result = CliRunner().invoke(app, ["regenerate", "--dir", str(tmp_path), "--only", only])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert result.output.startswith("golden: ")


def test_full_tensors_go_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTVERIFY_GOLDEN_DIR", str(tmp_path / "golden"))
    case = catalogue()["small"]
    with pytest.raises(NoGolden, match="--full --only small"):
        golden.load_full(case)
    golden.regenerate("small", full=True)
    found, expected = golden.load_full(case), forward_backward(make_inputs(case))
    for name in ALL_TENSORS:
        assert found[name].dtype == torch.float64
        assert compare(found[name], expected[name]).rel_l2 < 1e-12
    assert [path.name for path in golden.cache_dir().iterdir()] == ["small.safetensors"]


# ---- sketches


SHAPE = (12, 40, 55)


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(b: torch.Tensor, seed: int) -> torch.Tensor:
    return b + 0.003 * some(seed)


def relative_noise(b: torch.Tensor, seed: int) -> torch.Tensor:
    return b * (1 + 0.004 * some(seed))


def rounding(b: torch.Tensor, seed: int) -> torch.Tensor:
    return (b * (1 + seed / 1000)).to(torch.bfloat16).double() / (1 + seed / 1000)


def one_expert(b: torch.Tensor, seed: int) -> torch.Tensor:
    a = b.clone()
    a[seed % 12] = some(seed, *SHAPE[1:])
    return a


def one_column(b: torch.Tensor, seed: int) -> torch.Tensor:
    a = b.clone()
    a[:, :, seed % 55] = 0
    return a


def scaled(b: torch.Tensor, seed: int) -> torch.Tensor:
    return b * (1 + 0.01 * (seed + 1))


def swapped(b: torch.Tensor, seed: int) -> torch.Tensor:
    order = list(range(12))
    first, second = seed % 12, (seed + 5) % 12
    order[first], order[second] = second, first
    return b[order]


def single(b: torch.Tensor, seed: int) -> torch.Tensor:
    a = b.clone()
    a.view(-1)[(seed * 7919) % a.numel()] += 5.0
    return a


DIFFERENCES = [dense, relative_noise, rounding, one_expert, one_column, scaled, swapped, single]


@pytest.mark.parametrize("kind", DIFFERENCES, ids=lambda kind: kind.__name__)
def test_a_sketch_estimates_rel_l2_within_ten_per_cent(kind: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    ratios = []
    for seed in range(60):
        b = some(1000 + seed)
        a = kind(b, seed)
        found = compare_sketch(make_sketch(b, f"draw {seed}"), a)
        live = compare(a, b)
        ratios.append(found.rel_l2 / live.rel_l2)
        assert found.estimated
        assert found.norm_actual == pytest.approx(live.norm_actual, rel=1e-12)
        assert found.norm_expected == pytest.approx(live.norm_expected, rel=1e-12)
        assert found.cosine == pytest.approx(live.cosine, abs=0.1 * live.rel_l2**2 + 1e-9)
        assert found.max_abs <= live.max_abs
    assert min(ratios) > 0.9
    assert max(ratios) < 1.1
    # unbiased: 60 draws of 2.2 % standard deviation
    assert float(np.mean(ratios)) == pytest.approx(1, abs=0.012)


def test_a_sketch_of_itself_differs_by_nothing() -> None:
    b = some(1)
    found = compare_sketch(make_sketch(b, "s"), b)
    assert found.rel_l2 < 1e-12
    assert (found.max_abs, found.mean_rel, found.stray, found.non_finite) == (0.0, 0.0, 0, 0)
    assert found.cosine == pytest.approx(1)
    assert (found.nonzero, found.density) == (b.numel(), 1.0)


def test_mean_rel_is_estimated() -> None:
    b = some(2)
    for seed in range(10):
        a = dense(b, seed)
        found = compare_sketch(make_sketch(b, f"draw {seed}"), a)
        assert found.mean_rel == pytest.approx(compare(a, b).mean_rel, rel=0.25)


def test_dead_slices_are_compared_to_the_bit() -> None:
    b = some(3)
    b[[2, 5]] = 0
    sketch = make_sketch(b, "s")
    a = b.clone()
    assert compare_sketch(sketch, a).stray == 0
    a[5, 3, 4] = -1e-12
    found = compare_sketch(sketch, a)
    assert (found.stray, found.worst_index, found.worst_actual, found.worst_expected) == (1, (5, 3, 4), -1e-12, 0.0)
    a[5, 3, 4] = 3.0
    assert compare_sketch(sketch, a).rel_l2 == pytest.approx(3 / float(b.norm()))
    assert found.density == 1.0


def test_a_nan_is_seen_wherever_it_is() -> None:
    b = some(4)
    b[7] = 0
    sketch = make_sketch(b, "s")
    for place in ((0, 0, 0), (7, 39, 54), (11, 20, 33)):
        a = b.clone()
        a[place] = math.nan
        found = compare_sketch(sketch, a)
        assert (found.non_finite, found.worst_index) == (1, place)


def test_the_largest_entries_are_kept() -> None:
    b = some(5)
    b[3, 4, 5] = 40.0
    a = b.clone()
    a[3, 4, 5] = 39.0
    found = compare_sketch(make_sketch(b, "s"), a)
    assert (found.worst_index, found.max_abs, found.worst_expected) == ((3, 4, 5), 1.0, 40.0)


def test_what_cannot_be_sketched_is_refused() -> None:
    for wrong in (torch.zeros(()), torch.zeros(0, 3), torch.full((2, 2), math.nan, dtype=torch.float64)):
        with pytest.raises(ValueError, match="a sketch takes"):
            make_sketch(wrong, "s")
    with pytest.raises(ValueError, match="expected"):
        compare_sketch(make_sketch(some(6), "s"), some(6).reshape(12, 55, 40))


def test_a_sketch_is_pinned() -> None:
    """Its hash is part of the goldens: it changes with SKETCH_VERSION only."""
    b = torch.arange(1, 5001, dtype=torch.float64).reshape(5, 1000)
    sketch = make_sketch(b, "pinned")
    assert [float(v) for v in sketch.buckets[:4]] == PINNED_BUCKETS
    assert [int(v) for v in sketch.sample_index[:4]] == PINNED_SAMPLES
    assert sketch.largest_index.tolist() == list(range(4999, 4967, -1))
    assert isinstance(sketch, Sketch)


PINNED_BUCKETS = [863.0, -2483.0, 8838.0, 1304.0]
PINNED_SAMPLES = [3223, 1942, 611, 1109]


def test_sketches_are_of_large_tensors_only(made: Path) -> None:
    kept = golden.load(catalogue()["small"], made)
    for name, tensor in kept.tensors.items():
        size = math.prod(tensor.shape)
        assert (tensor.kind == "sketch") == (size > golden.FULL_LIMIT), name
    assert os.path.getsize(next(made.glob("small.*"))) < 1_000_000
