"""Run the native tests on machines with several NUMA nodes: small Linux guests under qemu, by software emulation.

Needs qemu-system-x86_64 and a Linux kernel for x86-64 with a built-in driver for the serial port, like those of
distributions: the newest of /boot, or that of the variable KTVERIFY_GUEST_KERNEL. Needs no root, downloads nothing.
Exits with 0 where all tests passed in all guests, with 1 where one failed, with 2 where something is missing.
`run.py NAME …` boots these guests alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[2] / "build" / "numa"
# the processors of each node; by name
GUESTS = {
    "two_nodes": ("0-1", "2-3"),
    "two_nodes_uneven": ("0-2", "3"),
    "four_nodes": ("0", "1", "2", "3"),
    "four_nodes_uneven": ("0-1", "2", "3-4", "5"),
}
# the engine's own tests, on the machines that are named here; test_placement runs on each
TESTS = {
    "two_nodes": ("test_team", "test_kernels"),
    "two_nodes_uneven": ("test_many_workers",),
    "four_nodes": ("test_team", "test_layer"),
}
MEBIBYTES = 384  # of a node
SECONDS = 1200  # that a guest may take
PASSED = 33  # the exit code of qemu when init.cpp says that all passed
QEMU = "qemu-system-x86_64"


def kernel() -> Path | None:
    """The kernel image that the guests boot, None without one that can be read."""
    named = os.environ.get("KTVERIFY_GUEST_KERNEL")
    found = [Path(named)] if named else sorted(Path("/boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    return next((path for path in reversed(found) if os.access(path, os.R_OK)), None)


def build() -> Path:
    """The folder with the statically linked tests."""
    static = ("-DCMAKE_EXE_LINKER_FLAGS=-static -s", "-DKTV_PYTHON=OFF", "-DKTV_TESTS=ON")
    programs = sorted({"numa_init", "test_placement", *(name for names in TESTS.values() for name in names)})
    for command in (
        ["cmake", "-S", str(HERE.parents[1]), "-B", str(BUILD), "-G", "Ninja", *static],
        ["cmake", "--build", str(BUILD), "--target", *programs],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return BUILD / "tests"


def archive(programs: dict[str, Path]) -> bytes:
    """A cpio archive ("newc") of these programs as the guest's first file system, with a console."""
    parts = [_entry("dev", 0o040755, b""), _entry("dev/console", 0o020600, b"", device=(5, 1))]
    parts += [_entry(name, 0o100755, path.read_bytes()) for name, path in programs.items()]
    return b"".join((*parts, _entry("TRAILER!!!", 0, b"")))


def _entry(name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 4)


def run(name: str, image: Path, tests: Path) -> bool:
    """Boot a guest and print what it prints. Whether all its tests passed."""
    nodes = GUESTS[name]
    commands = ["+".join(("test_placement", *nodes)), *TESTS.get(name, ())]
    files = {"init": tests / "numa_init", **{each.split("+")[0]: tests / each.split("+")[0] for each in commands}}
    initial = BUILD / f"{name}.cpio"
    initial.write_bytes(archive(files))
    processors = 1 + int(nodes[-1].split("-")[-1])
    machine = ["-smp", str(processors), "-m", f"{MEBIBYTES * len(nodes)}M"]
    for number, cpus in enumerate(nodes):
        machine += ["-object", f"memory-backend-ram,id=node{number},size={MEBIBYTES}M"]
        machine += ["-numa", f"node,nodeid={number},cpus={cpus},memdev=node{number}"]
    command = [
        *(QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"),
        *(*machine, "-kernel", str(image), "-initrd", str(initial)),
        *("-append", f"console=ttyS0 quiet panic=-1 rdinit=/init -- {' '.join(commands)}"),
    ]
    print(f"== {name}: nodes with CPUs {', '.join(nodes)}", flush=True)
    began = time.monotonic()
    try:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=SECONDS).returncode
        text = "passed" if code == PASSED else f"FAILED (qemu exited with {code})"
    except subprocess.TimeoutExpired:
        code, text = 1, f"FAILED (no end after {SECONDS} s)"
    print(f"== {name}: {text} after {time.monotonic() - began:.0f} s", flush=True)
    return code == PASSED


def main(names: list[str]) -> int:
    """The exit code."""
    image = kernel()
    if shutil.which(QEMU) is None or image is None:
        missing = QEMU if shutil.which(QEMU) is None else "a kernel in /boot that can be read"
        print(
            f"numa-test: {missing} is missing; on Debian: apt-get install qemu-system-x86 linux-image-amd64, "
            "or name a kernel's file by KTVERIFY_GUEST_KERNEL",
            file=sys.stderr,
        )
        return 2
    unknown = [name for name in names if name not in GUESTS]
    if unknown:
        print(f"numa-test: there is no guest {', '.join(unknown)}; there are {', '.join(GUESTS)}", file=sys.stderr)
        return 2
    tests = build()
    passed = [run(name, image, tests) for name in names or GUESTS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
