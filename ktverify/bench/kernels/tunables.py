"""The tunables of tunables.toml, and kernels that are compiled with another choice of one. Imports no torch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from ktverify.spec.cases import read_toml
from ktverify.system.files import ROOT

TABLE = Path(__file__).with_name("tunables.toml")
NATIVE = ROOT / "native"
KERNELS = NATIVE / "kernels"
TODAY = "today"
ProductName = Literal["nt", "nn"]

# as native/CMakeLists.txt compiles the files of kernels/
_FLAGS = ("-std=gnu++20", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-psabi", "-DNDEBUG")
_FLAGS_LINE = "// x86-64 flags: "


@dataclass(frozen=True)
class Tunable:
    """One constant of one instruction set's kernels. text: its place in `file` of native/kernels/, {} for the value;
    processors: "intel" or "other" where it is in the kernels of these alone, else ""."""

    isa: str
    name: str
    file: str
    text: str
    today: str
    others: tuple[str, ...]
    product: ProductName
    rows: tuple[int, ...]
    processors: str = ""

    @property
    def source(self) -> Path:
        return KERNELS / self.file

    def changed(self, value: str) -> str:
        """The file with another value. ValueError unless it has the constant, with the value of today, once."""
        text, now = self.source.read_text(encoding="utf-8"), self.text.format(self.today)
        if text.count(now) != 1:
            raise ValueError(
                f"{TABLE.name}, {self.isa}, {self.name}: {self.file} has {now!r} {text.count(now)} times, it "
                "takes 1; correct `text` and `today`"
            )
        return text.replace(now, self.text.format(value))


def tunables(isa: str, *, intel: bool | None = None) -> list[Tunable]:
    """Those of an instruction set, in the table's order; none where it has none. intel: only those of its kernels with
    Intel's counts, or of the others; None for all."""
    left_out = "" if intel is None else "other" if intel else "intel"
    found = [
        Tunable(
            isa=isa,
            name=row["name"],
            file=row["file"],
            text=row["text"],
            today=row["today"],
            others=tuple(row["others"]),
            product=cast(ProductName, row["product"]),
            rows=tuple(row["rows"]),
            processors=row.get("processors", ""),
        )
        for row in read_toml(TABLE).get(isa, ())
    ]
    return [one for one in found if not left_out or one.processors != left_out]


def compiler() -> str:
    """The path of g++. FileNotFoundError without it, or without the sources of the engine."""
    found = shutil.which("g++")
    if found is None or not NATIVE.is_dir():
        lacking = "g++" if found is None else str(NATIVE)
        raise FileNotFoundError(f"{lacking} is not here; `bench kernels` compiles the kernels of a checkout")
    return found


def compile_kernels(tunable: Tunable, value: str, folder: Path) -> Path:
    """A library in `folder` with the kernels of `tunable`, that has `value` instead of today's. RuntimeError with the
    compiler's words."""
    # a copy of all files, because an include is looked for beside the file that has it
    copied = folder / KERNELS.name
    shutil.copytree(KERNELS, copied)
    (copied / tunable.file).write_text(tunable.changed(value), encoding="utf-8")
    source = copied / f"{tunable.isa}.cpp"
    flags = next(
        line.removeprefix(_FLAGS_LINE).split()
        for line in source.read_text(encoding="utf-8").splitlines()
        if line.startswith(_FLAGS_LINE)
    )
    library = folder / "kernels.so"
    command = [compiler(), *_FLAGS, *flags, f"-I{NATIVE / 'include'}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tunable.name} = {value} does not compile: {done.stderr.strip()[:400]}")
    return library


def address_of_kernels(library: Path, isa: str, *, intel: bool) -> int:
    """The address of ktv::<isa>_kernels, or of those with Intel's counts, in a library, which stays loaded."""
    name = f"{isa}_kernels{'_intel' if intel else ''}"
    symbol = f"_ZN3ktv{len(name)}{name}E"  # as the C++ ABI spells it
    return ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(library)), symbol))
