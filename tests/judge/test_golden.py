"""Goldens: complete and small, equal to the oracle, unchanged by regeneration, whole after a kill."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ktverify.cli.golden import app
from ktverify.errors import EngineDied, NoGolden
from ktverify.isolation.child import ChildPool
from ktverify.judge import golden, golden_regenerate
from ktverify.judge.golden_regenerate import regenerate
from ktverify.judge.metrics import compare
from ktverify.judge.reference import forward_backward
from ktverify.spec.cases import Case, catalogue, select
from ktverify.spec.inputs import Inputs, inputs_sha256, make_inputs
from ktverify.spec.names import ALL_TENSORS, GRAD_WEIGHTS
from tests.support.command_line import python

ONLY = "one_token_odd,odd_sizes,exact_masked,nan_row,no_token,fresh_adapter,small"
FEW = [case.name for case in select(ONLY)]
ODD, SMALL = "odd_sizes@seed=0", "small@seed=0"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few goldens, made here. Tests that change them copy the directory."""
    directory = tmp_path_factory.mktemp("golden")
    regenerate(ONLY, directory=directory)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "golden", ignore=shutil.ignore_patterns(".lock"))


# ---- what is committed


@pytest.mark.parametrize("case", catalogue().values(), ids=lambda case: case.name)
def test_every_row_has_its_golden(case: Case) -> None:
    kept = golden.load(case)
    assert set(kept.tensors) == set(kept.rounding) == set(ALL_TENSORS)
    if case.exact:
        assert {tensor.kind for tensor in kept.tensors.values()} == {"full"}
    if case.tier == "default":
        assert kept.inputs_sha256 == inputs_sha256(make_inputs(case))


def test_committed_goldens_are_small_and_complete() -> None:
    directory = golden.golden_dir()
    files = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    assert sum(files.values()) <= 30e6
    entries = golden.read_manifest(directory)
    assert {entry["file"] for entry in entries.values()} == {name for name in files if name.endswith(".safetensors")}
    assert set(entries) == {case.id for case in catalogue().values()}
    for entry in entries.values():
        assert set(entry) >= {"case", "generator", "torch", "inputs_sha256", "file", "file_sha256", "tensors"}
        for tensor in entry["tensors"].values():
            assert set(tensor) >= {"shape", "kind", "sha256", "rounding"}


# ---- comparing with a golden


@pytest.mark.parametrize("name", FEW)
def test_a_golden_compares_like_the_oracle(made: Path, name: str) -> None:
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


def test_other_shapes_and_unknown_names_are_refused(made: Path) -> None:
    kept = golden.load(catalogue()["odd_sizes"], made)
    with pytest.raises(ValueError, match=r"shape is \[33, 96\], expected \[33, 97\]"):
        kept.compare("output", torch.zeros(33, 96))
    with pytest.raises(KeyError):
        kept.compare("grad_bias", torch.zeros(1))


def test_zero_tensors_are_not_stored_but_compared(made: Path) -> None:
    kept = golden.load(catalogue()["fresh_adapter"], made)
    assert kept.tensors["grad_gate_lora_a"].kind == "zero"
    wrong = torch.zeros(4, 8, 128)
    assert kept.compare("grad_gate_lora_a", wrong).rel_l2 == 0
    wrong[2, 1, 1] = 1e-12
    found = kept.compare("grad_gate_lora_a", wrong)
    assert (found.stray, found.worst_index, found.rel_l2) == (1, (2, 1, 1), math.inf)


def test_only_an_unchanged_row_has_a_golden(made: Path) -> None:
    small = catalogue()["small"]
    golden.load(small, made)
    for other in (small.with_seed(1), Case.parse("small,T=31"), Case.parse("E=2,k=1,H=8,I=8,T=2,r=1")):
        with pytest.raises(NoGolden, match="regenerate"):
            golden.load(other, made)
    with pytest.raises(FileNotFoundError):
        golden.load(small, made / "nowhere")


def test_a_manifest_that_another_process_changes_is_refused(copy: Path) -> None:
    small, path = catalogue()["small"], copy / golden.MANIFEST
    golden.remember_manifest(copy)
    right = path.read_text()
    path.write_text(right + "\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has changed since this process read it first; .*, and start again"):
            golden.load(small, copy)
    path.write_text(right)
    golden.load(small, copy)


# ---- regenerating


def test_a_regeneration_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    # in another process: nothing may depend on what this one has computed before
    first = python("-m", "ktverify.golden", "regenerate", "--dir", again, "--only", ONLY)
    assert (first.returncode, first.stderr) == (0, "")
    assert f"0 goldens unchanged, {len(FEW)} written" in first.stdout
    assert content(again) == content(made)
    few = "odd_sizes,small,exact_masked"
    assert len(regenerate(few, directory=again, force=True).written) == 3
    assert len(regenerate(few, directory=again).unchanged) == 3
    assert content(again) == content(made)


def edit(directory: Path, change: Callable[[dict[str, golden.Entry]], object]) -> None:
    entries = golden.read_manifest(directory)
    change(entries)
    golden.write_manifest(directory, entries)


def entry_with(**fields: object) -> Callable[[Path], None]:
    return lambda directory: edit(directory, lambda entries: entries[ODD].update(fields))


def spoil_file(directory: Path) -> None:
    path = next(directory.glob("odd_sizes.*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def spoil_value(directory: Path) -> None:
    """Replace a golden by an intact one of other values: grad_input is off by 1e-6."""
    made, _ = golden_regenerate.compute(catalogue()["odd_sizes"])
    stored = made.tensors["grad_input"]
    assert isinstance(stored.value, torch.Tensor)
    wrong = {**made.tensors, "grad_input": replace(stored, value=stored.value * (1 + 1e-6))}
    entry = golden.write_golden(replace(made, tensors=wrong), directory)
    edit(directory, lambda entries: entries.update({ODD: entry}))


DRIFTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a golden is missing": (lambda d: edit(d, lambda c: c.pop(ODD)), "odd_sizes@seed=0: has no golden"),
    "a file is missing": (lambda d: next(d.glob("odd_sizes.*")).unlink(), "is missing"),
    "a file is damaged": (spoil_file, "is not what the manifest says"),
    "a value is off by 1e-6": (spoil_value, "grad_input differs by rel_l2 9.5e-07"),
    "inputs changed": (entry_with(inputs_sha256="0" * 64), "the golden was made of 000000000000"),
    "the generator changed": (entry_with(generator=0), "made by generator 0"),
    "the row changed": (entry_with(case="E=4"), "was E=4, is E=5,k=2"),
    "the errors of rounding changed": (
        lambda d: edit(d, lambda c: c[ODD]["tensors"]["output"]["rounding"].update(rel_l2=5e-2)),
        "output: the budget is",
    ),
    "it is older than errors of rounding": (
        lambda d: edit(d, lambda c: c[ODD]["tensors"]["output"].pop("rounding")),
        "is of an older version of this suite",
    ),
}


@pytest.mark.parametrize("what", DRIFTS)
def test_check_names_what_drifted_and_writes_nothing(copy: Path, what: str) -> None:
    spoil, says = DRIFTS[what]
    spoil(copy)
    before = content(copy)
    result = regenerate("odd_sizes", directory=copy, check=True)
    assert [line for line in result.lines if says in line], result.lines
    assert result.written == [ODD]
    assert content(copy) == before
    # a regeneration repairs it
    regenerate("odd_sizes", directory=copy)
    assert regenerate("odd_sizes", directory=copy, check=True).lines == []


def test_check_exits_1(copy: Path) -> None:
    arguments = ["regenerate", "--dir", str(copy), "--only", "odd_sizes,no_token", "--check"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    spoil_file(copy)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "drifted: odd_sizes@seed=0" in result.output
    assert "1 goldens unchanged, 1 drifted" in result.output


def test_other_last_bits_change_no_golden(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def oracle_times(factor: float) -> Callable[[Inputs], dict[str, torch.Tensor]]:
        return lambda inputs: {name: value * factor for name, value in forward_backward(inputs).items()}

    before = content(copy)
    monkeypatch.setattr(golden_regenerate, "forward_backward", oracle_times(1 + 1e-13))
    assert regenerate("odd_sizes,small", directory=copy).written == []
    assert content(copy) == before
    monkeypatch.setattr(golden_regenerate, "forward_backward", oracle_times(1.00001))
    assert regenerate("odd_sizes,small", directory=copy).written == [SMALL, ODD]


def test_goldens_of_deleted_rows_are_deleted(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {name: catalogue()[name] for name in ("small", "odd_sizes")}
    monkeypatch.setattr(golden_regenerate, "catalogue", lambda: left)
    monkeypatch.setattr(golden_regenerate, "select", lambda only: list(left.values()))
    result = regenerate(directory=copy)
    assert len([line for line in result.lines if "no row of the catalogue" in line]) == len(FEW) - 2
    assert sorted(path.name.split(".")[0] for path in copy.glob("*.safetensors")) == ["odd_sizes", "small"]


STRANGERS = ("model.safetensors", "small.0123456789ab.safetensors", ".staging-mine/a.safetensors", "notes.txt")


def test_files_that_no_manifest_named_stay(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be any: only the files that the old manifest named may go."""
    for name in STRANGERS:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("of somebody else")
    link = copy / "linked.safetensors"
    link.symlink_to(copy / STRANGERS[0])
    left = {name: catalogue()[name] for name in ("small", "odd_sizes")}
    monkeypatch.setattr(golden_regenerate, "catalogue", lambda: left)
    monkeypatch.setattr(golden_regenerate, "select", lambda only: list(left.values()))
    regenerate(directory=copy, force=True)
    assert all((copy / name).read_text() == "of somebody else" for name in STRANGERS)
    assert link.is_symlink()


@pytest.mark.parametrize("file", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "notes.txt", ""])
def test_a_manifest_that_names_no_golden_is_refused(copy: Path, file: str) -> None:
    edit(copy, lambda entries: entries[ODD].update(file=file))
    before = content(copy)
    with pytest.raises(ValueError, match=r"the file of odd_sizes@seed=0 is .*; it takes the name of a .safetensors"):
        regenerate("odd_sizes", directory=copy)
    assert content(copy) == before


def regenerate_until(moment: str, directory: Path) -> None:
    """Regenerate small and odd_sizes; SIGKILL to this process once the step named by `moment` is done."""
    compute, write_manifest = golden_regenerate.compute, golden.write_manifest

    def die(*_: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(*arguments: Any) -> None:
        write_manifest(*arguments)
        die()

    def doubled(inputs: Inputs) -> dict[str, torch.Tensor]:
        return {name: 2 * value for name, value in forward_backward(inputs).items()}

    steps = {
        "computing": ("compute", lambda case: compute(case) if case.name == "small" else die()),
        "staged": ("_publish", die),
        "files moved": ("write_manifest", die),
        "manifest replaced": ("write_manifest", write_and_die),
        "other files moved": ("write_manifest", die),
        "other manifest replaced": ("write_manifest", write_and_die),
    }
    patches = [steps[moment]]
    if moment.startswith("other"):  # other content, and so other names: the old files or the new ones must go
        patches.append(("forward_backward", doubled))
    for name, function in patches:
        setattr(golden_regenerate, name, function)
    regenerate("odd_sizes,small", directory=directory, force=True)


@pytest.mark.parametrize(
    "moment",
    ["computing", "staged", "files moved", "manifest replaced", "other files moved", "other manifest replaced"],
)
def test_the_goldens_are_whole_after_a_kill_at_any_moment(
    copy: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, lambda entries: [entries[key].update(inputs_sha256="1" * 64) for key in (ODD, SMALL)])
    before = content(copy)
    with pytest.raises(EngineDied, match="died of SIGKILL"):
        ChildPool().call_fresh(regenerate_until, moment, copy)
    monkeypatch.setattr(golden, "_known_texts", {})  # of before the regeneration in the other process
    after = content(copy)
    if "manifest replaced" not in moment:
        assert {name: after[name] for name in before} == before
    for name in FEW:
        golden.load(catalogue()[name], copy)
    # the next regeneration clears what the killed process left
    regenerate("no_token", directory=copy)
    files = {entry["file"] for entry in golden.read_manifest(copy).values()}
    assert {path.name for path in copy.iterdir()} == files | {".lock", golden.MANIFEST}


def test_two_regenerations_at_once_are_refused(copy: Path) -> None:
    with golden_regenerate._staging(copy), pytest.raises(ValueError, match="another process regenerates"):
        regenerate("small", directory=copy)


@pytest.mark.parametrize("only", ["no_such_*", "small@seed=3", "E=2,k=1,H=8,I=8,T=2,r=1"])
def test_a_case_that_is_no_row_is_refused(tmp_path: Path, only: str) -> None:
    result = CliRunner().invoke(app, ["regenerate", "--dir", str(tmp_path), "--only", only])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert result.output.startswith("error: ")


def test_full_tensors_are_written_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTVERIFY_GOLDEN_DIR", str(tmp_path / "golden"))
    case = catalogue()["small"]
    with pytest.raises(NoGolden, match="--full --only small"):
        golden.load_full(case)
    regenerate("small", full=True)
    found, expected = golden.load_full(case), forward_backward(make_inputs(case))
    for name in ALL_TENSORS:
        assert found[name].dtype == torch.float64
        assert compare(found[name], expected[name]).rel_l2 < 1e-12
    assert [path.name for path in golden.cache_dir().iterdir()] == ["small.safetensors"]


def test_only_large_tensors_are_sketched(made: Path) -> None:
    for name, tensor in golden.load(catalogue()["small"], made).tensors.items():
        assert (tensor.kind == "sketch") == (math.prod(tensor.shape) > golden_regenerate.FULL_LIMIT), name
    assert next(made.glob("small.*")).stat().st_size < 1_000_000
