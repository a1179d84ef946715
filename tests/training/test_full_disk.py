"""A disk that becomes full, here a limit on a file's size: each command says in one line where, and what to do."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError
from typer.testing import Result

from ktverify.training.output_directory import writing
from ktverify.training.pretrained import load_model
from ktverify.training.tiny import make_tiny
from tests.support import models
from tests.support.command_line import call, ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
FAMILY = "qwen3_moe"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger than `size` bytes: a write behind them is an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint base, an adapter of it, and train.yaml."""
    folder = tmp_path_factory.mktemp("home")
    base = make_tiny(FAMILY, folder / "base")
    models.adapted(load_model(str(base), "bfloat16")).save_pretrained(str(folder / "adapter"))
    keys = {
        "model_name_or_path": str(base),
        "dataset": "alpaca_tiny",
        "max_steps": 1,
        "save_steps": 1,
        "cutoff_len": 16,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump({**keys, "kt_num_threads": 1, "output_dir": "nowhere"}))
    return folder


def size_of(home: Path, file: str) -> int:
    return (home / file).stat().st_size


# command -> its words, and the size of file that is too large, in the home
COMMANDS: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "make-tiny": (lambda home, out: ["make-tiny", FAMILY, "--out", out], "base/model.safetensors"),
    "make-tiny's tokenizer": (lambda home, out: ["make-tiny", FAMILY, "--out", out], "base/tokenizer.json"),
    "train": (
        lambda home, out: ["train", home / "train.yaml", "--output_dir", out],
        "adapter/adapter_model.safetensors",
    ),
    "export-merged": (
        lambda home, out: ["export-merged", home / "adapter", "--base", home / "base", "--out", out],
        "base/model.safetensors",
    ),
    "export-adapter": (
        lambda home, out: [
            *("export-adapter", home / "adapter", "--base", home / "base", "--format", "per-expert", "--out", out)
        ],
        "adapter/adapter_model.safetensors",
    ),
    "quantise": (
        lambda home, out: ["quantise", home / "base", "--to", "int8", "--out", out],
        "base/tokenizer.json",
    ),
}


def expect_error(result: Result, pattern: str) -> None:
    """AssertionError unless the call ended with exit code 2 and one line of error; others may stand before it."""
    ends(result, 2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert re.search(pattern, errors[0]), errors[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_that_names_the_folder(command: str, home: Path, tmp_path: Path) -> None:
    words, file = COMMANDS[command]
    with largest_file(size_of(home, file) // 2):
        result = call(*words(home, tmp_path / "out"))
    expect_error(result, rf"^error: {tmp_path}/out cannot be written: File too large; raise the limit on a file's size")
    if command != "train":  # it keeps its losses
        assert not any(tmp_path.iterdir())


def test_a_full_disk_at_a_file_of_torch(home: Path, tmp_path: Path) -> None:
    """torch.save has no number of the error. The trained adapter is float32, the optimizer's state twice as large."""
    with largest_file(size_of(home, "adapter/adapter_model.safetensors") * 3):
        result = call("train", home / "train.yaml", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    expect_error(result, rf"^error: {tmp_path}/out cannot be written: torch could not write a file .*; make room, or ")


ROOM = "No space left on device; make room, or name another folder"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "part/a"), ROOM),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), ROOM),
        (Exception("Disk quota exceeded (os error 122)"), "Disk quota exceeded; make room, or name another folder"),
    ],
)
def test_a_librarys_error_of_a_full_disk_names_the_folder(error: Exception, wanted: str) -> None:
    with pytest.raises(OSError, match=f"^saves/out cannot be written: {wanted}$"), writing(Path("saves/out")):
        raise error


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, os.strerror(errno.EACCES), "base"), SafetensorError("x"), RuntimeError("y")]
)
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, writing(Path("saves/out")):
        raise error
    assert raised.value is error
