"""Time the kernels of today beside those with other constants: many short rounds, one call of each in every round.

W lies in memory that no cache holds, and each call multiplies another window of it. In every round the machine's read
rate and register peak are measured as well, so that all figures are of one burst.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktverify.bench.kernels.record import Line, OtherBitsLine, TimeLine, TunableCeilingLine, TunableLine
from ktverify.bench.kernels.tunables import Tunable, address_of_kernels, compile_kernels
from ktverify.bench.timed_run import OtherLoadLine
from ktverify.system.limits import processors
from ktverify.system.timing import OtherLoad

_WARMUP = 2
# of the ceilings: two passes over what no cache holds, and some milliseconds
_READ_BYTES, _READ_PASSES, _MULTIPLY_SECONDS = 1 << 27, 3, 0.004


@dataclass(frozen=True)
class KernelSettings:
    """How to measure. n, k: rows and columns of a matrix, multiples of 32; rounds: those that count.

    arena: bytes of weights; window: bytes of one call, at least one matrix."""

    isa: str
    threads: int
    n: int = 2048
    k: int = 7168
    rounds: int = 60
    arena: int = 1 << 30
    window: int = 59 << 20


class KernelTimes:
    """The measurement of some tunables of one instruction set."""

    def __init__(self, settings: KernelSettings, chosen: Sequence[Tunable]) -> None:
        if settings.n % 32 or settings.k % 32 or min(settings.n, settings.k) < 32:
            raise ValueError(f"a matrix of {settings.n} x {settings.k}: it takes multiples of 32")
        self.settings, self.chosen = settings, chosen

    def count(self) -> int:
        """The number of lines of `lines`, if all values compute the same bits."""
        return sum(
            len(tunable.rows) * (1 + self.settings.rounds * (2 + len(tunable.others))) for tunable in self.chosen
        )

    def lines(self) -> Iterator[Line]:
        """Compile all values, then measure spot after spot."""
        from ktverify import _native

        s = self.settings
        load = OtherLoad()
        with tempfile.TemporaryDirectory(prefix="ktverify-kernels-") as name:
            today, intel = _native.kernels_of(s.isa)
            tables = self._compiled(Path(name), intel)
            products = _native.Products(s.threads, s.arena)
            number = 0
            for tunable in self.chosen:
                kernels = {tunable.today: today, **{v: tables[tunable.name, v] for v in tunable.others}}
                for rows in tunable.rows:
                    yield from self._spot(number, tunable, rows, kernels, products)
                    number += 1
        yield OtherLoadLine(others=load.share())

    def _compiled(self, folder: Path, intel: bool) -> dict[tuple[str, str], int]:
        wanted = [(tunable, value) for tunable in self.chosen for value in tunable.others]
        places = [folder / str(number) for number in range(len(wanted))]
        for place in places:
            place.mkdir()
        with ThreadPoolExecutor(processors()) as pool:
            libraries = pool.map(compile_kernels, *zip(*wanted, strict=True), places)
            return {
                (tunable.name, value): address_of_kernels(library, tunable.isa, intel=intel)
                for (tunable, value), library in zip(wanted, libraries, strict=True)
            }

    def _spot(self, number: int, tunable: Tunable, rows: int, kernels: dict[str, int], products: Any) -> Iterator[Line]:
        from ktverify import _native

        s = self.settings
        matrices = max(1, s.window // (2 * s.n * s.k))
        sizes = {"backward": tunable.product == "nn", "rows": rows, "n": s.n, "k": s.k, "matrices": matrices}

        def call(value: str, window: int, check: bool = False) -> tuple[float, float, float, int]:
            table = kernels[value]
            found: tuple[float, float, float, int] = products.time(kernels=table, window=window, check=check, **sizes)
            return found

        _, size, flops, bits = call(tunable.today, 0, True)
        facts = {"tunable": tunable.name, "today": tunable.today, "product": tunable.product, "rows": rows}
        yield TunableLine.model_validate({"number": number, "bytes": size, "flops": flops, **facts})
        timed = [tunable.today]
        for value in tunable.others:
            if call(value, 0, True)[3] == bits:
                timed.append(value)
            else:
                yield OtherBitsLine(number=number, value=value)
        window = 1
        for round_ in range(-_WARMUP, s.rounds):
            for value in timed:
                seconds = call(value, window)[0]
                window += 1
                if round_ >= 0:
                    yield TimeLine(number=number, round=round_, value=value, ns=round(1e9 * seconds))
            read = _native.read_rate(s.threads, _READ_BYTES, _READ_PASSES)
            multiply = _native.multiply_rate(s.isa, s.threads, _MULTIPLY_SECONDS)
            if round_ >= 0:
                yield TunableCeilingLine(number=number, round=round_, read=read, multiply=multiply)
