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
TODAY = "today"
ProductName = Literal["nt", "nn"]

# as native/CMakeLists.txt compiles the files of kernels/
_FLAGS = ("-std=gnu++20", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-psabi", "-DNDEBUG")
_FLAGS_LINE = "// x86-64 flags: "


@dataclass(frozen=True)
class Tunable:
    """One constant of one instruction set's kernels. text: its place in the source, {} for the value; file: which of
    native/kernels/ has it, where that is not the instruction set's own."""

    isa: str
    name: str
    text: str
    today: str
    others: tuple[str, ...]
    product: ProductName
    rows: tuple[int, ...]
    file: str = ""

    @property
    def kernels(self) -> Path:
        return NATIVE / "kernels" / f"{self.isa}.cpp"

    @property
    def source(self) -> Path:
        return self.kernels.with_name(self.file or self.kernels.name)

    def changed(self, value: str) -> str:
        """The source with another value. ValueError unless it has the constant, with the value of today, once."""
        text, now = self.source.read_text(encoding="utf-8"), self.text.format(self.today)
        if text.count(now) != 1:
            raise ValueError(
                f"{TABLE.name}, {self.isa}, {self.name}: {self.source.name} has {now!r} {text.count(now)} times, it "
                "takes 1; correct `text` and `today`"
            )
        return text.replace(now, self.text.format(value))


def tunables(isa: str) -> list[Tunable]:
    """Those of an instruction set, in the table's order; none where it has none."""
    return [
        Tunable(
            isa=isa,
            name=row["name"],
            text=row["text"],
            today=row["today"],
            others=tuple(row["others"]),
            product=cast(ProductName, row["product"]),
            rows=tuple(row["rows"]),
            file=row.get("file", ""),
        )
        for row in read_toml(TABLE).get(isa, ())
    ]


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
    source = folder / tunable.kernels.name
    # a copy of the kernels beside a changed header, which they include from their own folder first
    shutil.copy(tunable.kernels, source)
    (folder / tunable.source.name).write_text(tunable.changed(value), encoding="utf-8")
    flags = next(
        line.removeprefix(_FLAGS_LINE).split()
        for line in source.read_text(encoding="utf-8").splitlines()
        if line.startswith(_FLAGS_LINE)
    )
    library = folder / "kernels.so"
    places = [f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'kernels'}"]
    command = [compiler(), *_FLAGS, *flags, *places, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tunable.name} = {value} does not compile: {done.stderr.strip()[:400]}")
    return library


def address_of_kernels(library: Path, isa: str) -> int:
    """The address of ktv::<isa>_kernels in a library, which stays loaded."""
    name = f"{isa}_kernels"
    symbol = f"_ZN3ktv{len(name)}{name}E"  # as the C++ ABI spells it
    return ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(library)), symbol))
