"""The tensors of a checkpoint in safetensors, mapped: of one file, several with an index, or a folder."""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ktverify.system.files import expand
from ktverify.system.text import read_json

INDEX = "model.safetensors.index.json"


class MappedFile:
    """A safetensors file that is mapped; its tensors read their pages when they are used.

    A page beyond the end of a file ends the process (SIGBUS). So the size is compared before pages are read; the file
    is held open for that, because a file that replaced it under its name says nothing of the mapped one.
    ValueError for a file that is no safetensors file, as one that was cut short, and for a tensor that its header has
    twice: safetensors would read the last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        try:
            self._opened = safe_open(path, "pt")
        except Exception as error:  # the library raises exceptions of its own and others
            why = _cut_short(self._file, self._size) or error
            raise ValueError(f"{path} is no safetensors file: {why}") from None
        if twice := _header(self._file)[2]:
            raise ValueError(f"{path}: {twice[0]} is in the header twice; write the file again")

    def check(self) -> None:
        """OSError if the file has become shorter."""
        size = os.fstat(self._file).st_size
        if size < self._size:
            raise OSError(
                f"{self.path} has {size} bytes, and had {self._size} when it was loaded: write it again, and call "
                "load_weights again"
            )

    def identity(self) -> tuple[int, ...]:
        """Which file this is, and its content as far as the time of the last change shows it."""
        about = os.fstat(self._file)
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    def tensor(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._opened.get_tensor(name)  # type: ignore[no-untyped-call]
        return found

    def names(self) -> list[str]:
        return list(self._opened.keys())  # type: ignore[no-untyped-call]

    def slice(self, name: str) -> Any:
        """dtype, shape and values of a tensor, of which only the header is read. SafetensorError where it is none."""
        return self._opened.get_slice(name)  # type: ignore[no-untyped-call]


def _header(file: int) -> tuple[int, dict[str, Any], list[str]]:
    """Of a safetensors file: where its header ends, the header, and the names that it has twice."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    twice: list[str] = []

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        return dict(pairs)

    return 8 + length, json.loads(os.pread(file, length, 8), object_pairs_hook=kept), twice


def _cut_short(file: int, size: int) -> str:
    """What a file that was cut short to `size` bytes lacks, in words; "" for another fault."""
    if int.from_bytes(os.pread(file, 8, 0), "little") > size:
        return ""
    try:
        begin, header, _ = _header(file)
        ends = {name: begin + about["data_offsets"][1] for name, about in header.items() if "data_offsets" in about}
        end, name = min((end, name) for name, end in ends.items() if end > size)
    except Exception:  # the library has said what is wrong
        return ""
    return f"it was cut short, {name} ends at byte {end}, the file has {size}"


class Checkpoint:
    """The tensors at `path`, a safetensors file or a folder of such files, by their full names.

    An index says which file counts. ValueError for a path that is neither, and for a file that is no safetensors file,
    as one that was cut short. option: what names the path, in errors.
    """

    def __init__(self, path: str | Path, option: str = "weight_path") -> None:
        self.path, self.where = Path(expand(str(path))), f"{option} {str(path)!r}"
        self.files_of = _files_of(path, option)
        self.mapped: dict[Path, MappedFile] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.files_of

    def again(self) -> Checkpoint:
        """The same tensors, mapped anew: the pages that are read through it are given back with it."""
        found = object.__new__(Checkpoint)
        found.path, found.where, found.files_of, found.mapped = self.path, self.where, self.files_of, {}
        return found

    def lookup(self, name: str) -> tuple[Path, Any] | None:
        """File and slice of a tensor, None where there is none. ValueError where files and index disagree."""
        if name not in self.files_of:
            return None
        file = self._file_of(name)
        try:
            return file, self.mapped[file].slice(name)
        except SafetensorError:
            raise ValueError(f"{INDEX} says that {name} is in {file.name}, which does not have it") from None

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that reads its pages from the file when they are used. The name must be one of `lookup`."""
        return self.mapped[self._file_of(name)].tensor(name)

    def _file_of(self, name: str) -> Path:
        if len(self.files_of[name]) > 1:
            twice = " and ".join(file.name for file in self.files_of[name][:2])
            raise ValueError(f"{self.where} has {name} in {twice}, and no {INDEX} that says which; remove one")
        file = self.files_of[name][0]
        if file not in self.mapped:
            if not file.is_file():
                raise ValueError(f"{INDEX} says that {name} is in {file.name}, which is not in {str(file.parent)!r}")
            self.mapped[file] = MappedFile(file)
        return file


def _files_of(path: str | Path, option: str) -> dict[str, list[Path]]:
    """The files of each tensor, by its full name; an index names one for each."""
    text, path = str(path), Path(expand(str(path)))
    if not text or not path.exists():
        raise ValueError(f"{option} is {text!r}; it takes a safetensors file or a folder of them")
    if path.suffix == ".kt" or (path.is_dir() and next(path.rglob("*.kt"), None)):
        raise ValueError(
            f"{option} {text!r} has kt-kernel's .kt files: they are packed for its kernels and one number of NUMA "
            "nodes, and nothing else reads them; name the checkpoint in safetensors that they were made of"
        )
    if path.is_file():
        return {name: [path] for name in _names_in(path)}
    if (path / INDEX).is_file():
        return {name: [path / file] for name, file in read_index(path / INDEX).items()}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{option} {text!r} has no *.safetensors; it takes a safetensors file or a folder")
    found: dict[str, list[Path]] = {}
    for file in files:
        for name in _names_in(file):
            found.setdefault(name, []).append(file)
    return found


def read_index(path: Path) -> dict[str, str]:
    """weight_map of an index: the file beside it of each tensor. ValueError, with the index, for anything else."""
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict):
        raise ValueError(f"{path} has no weight_map; it takes the file of each tensor")
    for name, file in listed.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file:
            raise ValueError(f"{path}: the file of {name} is {file!r}; it takes the name of a file beside it")
    return listed


def _names_in(file: Path) -> list[str]:
    return MappedFile(file).names()
