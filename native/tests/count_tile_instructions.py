#!/usr/bin/env python3
"""Counts what the inner loops of the AMX kernels execute for each k-block, in their machine code, and compares it with
what they are designed for. Loads, products and prefetches decide the speed; no test on a CPU without AMX would see a
compiler that adds one, or an edit that prefetches a line twice.

    native/tests/count_tile_instructions.py [COMPILER]

Compiles kernels/amx_bf16.cpp with the flags that it names, and disassembles it with objdump.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

NATIVE = Path(__file__).resolve().parent.parent
SOURCE = NATIVE / "kernels" / "amx_bf16.cpp"
COUNTED = ("tileloadd", "tileloaddt1", "tilestored", "tdpbf16ps", "prefetcht1")


def designed(name: str) -> Counter[str]:
    """What the inner loop of a pass executes for each k-block; `name` with its template arguments.

    two_strips<lines>: one tile of x and the four of two strips' blocks; `lines` prefetches for each of the two.
    one_strip_pass<G, lines>: two tiles of W by G of x, `lines` prefetches.
    quad_passes<G, lines, x_lines>: one tile of W, streaming, by G of x; prefetches of W and of x.
    nn_pass<M, pairs, row_lines>: M tiles of rows by two of a panel; two lines a pair, and row_lines of the rows, which
    then stream.
    """
    function, *numbers = re.findall(r"\w+", name)
    n = [int(number) for number in numbers]
    if function == "two_strips":
        loads, streamed, products, prefetches = 5, 0, 4, 2 * n[0]
    elif function == "one_strip_pass":
        loads, streamed, products, prefetches = 2 + n[0], 0, 2 * n[0], n[1]
    elif function == "quad_passes":
        loads, streamed, products, prefetches = n[0], 1, n[0], n[1] + n[2]
    elif function == "nn_pass":
        rows, pairs, row_lines = n
        streamed = rows if row_lines else 0
        loads, products, prefetches = 2 + rows - streamed, 2 * rows, 2 * pairs + row_lines
    else:
        raise SystemExit(f"{name} has a loop of tile products, and this script has no design for it: add one")
    counts = {"tileloadd": loads, "tileloaddt1": streamed, "tdpbf16ps": products, "prefetcht1": prefetches}
    return Counter({key: count for key, count in counts.items() if count})


def disassembled(compiler: str) -> str:
    """The demangled disassembly of the kernels, with the flags of a release."""
    first = next(line for line in SOURCE.read_text("utf-8").splitlines() if line.startswith("// x86-64 flags: "))
    flags = first.removeprefix("// x86-64 flags: ").split()
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/kernels.o"
        options = ["-std=gnu++20", "-O3", "-fPIC", "-ffp-contract=off", "-Wno-psabi", f"-I{NATIVE / 'include'}"]
        subprocess.run([compiler, *options, *flags, "-c", str(SOURCE), "-o", made], check=True)
        command = ["objdump", "-d", "-C", "--no-show-raw-insn", made]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def functions(text: str) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
    """Each function's name and instructions: address, mnemonic, operands."""
    for head, body in re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)*)", text, re.MULTILINE):
        rows = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ ]*(.*)$", body, re.MULTILINE)
        yield head, [(int(at, 16), what, operands) for at, what, operands in rows]


def inner_loops(code: list[tuple[int, str, str]]) -> Iterator[Counter[str]]:
    """What each innermost loop with a tile product executes: the code from a conditional jump's target up to the jump.

    The compiler may end a loop in several such places. An unconditional jump leads back from code that it moved away.
    """
    places = {at: i for i, (at, _, _) in enumerate(code)}
    loops = []
    for i, (at, what, operands) in enumerate(code):
        target = re.match(r"([0-9a-f]+) <", operands)
        if re.match(r"j(?!mp)", what) and target and places.get(int(target[1], 16), i) < i and int(target[1], 16) < at:
            loops.append((places[int(target[1], 16)], i))
    for first, last in loops:
        inner = [loop for loop in loops if loop != (first, last) and first <= loop[0] and loop[1] <= last]
        counts = Counter(what for _, what, _ in code[first : last + 1] if what in COUNTED)
        if counts["tdpbf16ps"] and not inner:
            yield counts


def main() -> int:
    compiler = sys.argv[1] if len(sys.argv) > 1 else "g++"
    seen, wrong = Counter[str](), 0
    for head, code in functions(disassembled(compiler)):
        if not any(what == "tdpbf16ps" for _, what, _ in code):
            continue
        name = re.sub(r"\(anonymous namespace\)::", "", head)
        name = re.search(r"(\w+(<[^()]*>)?)\(", name.replace("ktv::", ""))[1]  # type: ignore[index]
        wanted = designed(name)
        loops = list(inner_loops(code))
        seen[name.split("<")[0]] += 1
        if not loops or any(loop != wanted for loop in loops):
            wrong += 1
            print(f"FAIL {name}: for each k-block designed {dict(wanted)}, found {[dict(loop) for loop in loops]}")
    missing = {"two_strips", "one_strip_pass", "quad_passes", "nn_pass"} - seen.keys()
    for name in sorted(missing):
        print(f"FAIL {name}: not in the machine code")
    print(f"{seen.total() - wrong} inner loops of tiles as designed, {wrong + len(missing)} not")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
