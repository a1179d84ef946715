"""The facts about this machine that the header of a report and `doctor` print.

Read from /proc, /sys, one system call, `git` and the compiler's version line. Nothing here imports torch or the
engine: the list of instruction sets is read from the CPU's flags, so that a report shows when an engine leaves one out.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ktverify.system import limits
from ktverify.system.instruction_sets import AMX, AVX512_BF16, ISA_FLAGS
from ktverify.system.limits import read_text

# arch/x86/include/uapi/asm/prctl.h and the XSAVE feature number of the tile data
ARCH_GET_XCOMP_SUPP = 0x1021
ARCH_GET_XCOMP_PERM = 0x1022
XFEATURE_XTILEDATA = 18
EMULATION_VARIABLE = "KTVERIFY_EMULATE_AMX"
_SYS_ARCH_PRCTL_X86_64 = 158

# the packages whose versions can change a number or a verdict
REPORTED_PACKAGES = ("torch", "numpy", "safetensors", "pybind11", "pytest", "pytest-xdist")


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node: its number, its CPUs as the kernel writes them ("0-15,32-47") and its memory in bytes."""

    node: int
    cpus: str
    memory_bytes: int


@dataclass(frozen=True)
class Amx:
    """AMX as this process sees it: the CPU's flag, the kernel's support, and whether the process already asked."""

    cpu: bool
    kernel: bool
    permitted: bool
    emulated: bool

    @property
    def usable(self) -> bool:
        return self.cpu and self.kernel


@dataclass(frozen=True)
class Machine:
    """The facts of a machine. Sizes in bytes; `threads` is how many CPUs this process may use at a time, cpu_quota what
    its control groups give it (0 without a quota)."""

    cpu: str
    architecture: str
    isas: tuple[str, ...]
    flags: tuple[str, ...]
    amx: Amx
    threads: int
    cpus_online: int
    numa: tuple[NumaNode, ...]
    memory_total_bytes: int
    memory_limit_bytes: int
    memory_available_bytes: int
    huge_pages: str
    huge_pages_free: int
    system: str
    versions: dict[str, str] = field(default_factory=dict)
    cpu_quota: float = 0.0

    @property
    def memory_bytes(self) -> int:
        """The memory this process may use at most: the machine's, or less under a control group's limit."""
        return min(self.memory_total_bytes, self.memory_limit_bytes or self.memory_total_bytes)

    @property
    def best_isa(self) -> str:
        return self.isas[0]


def read_machine() -> Machine:
    """The machine this process runs on. Facts that the system does not tell are empty or 0; nothing is raised."""
    model, flags = _cpuinfo()
    amx = amx_state(flags)
    memory = limits.meminfo()
    limit, in_use = limits.cgroup_memory()
    quota = limits.cpu_quota()
    available = memory.get("MemAvailable", 0)
    if limit:
        available = min(available, max(0, limit - in_use))
    return Machine(
        cpu=model,
        architecture=platform.machine(),
        isas=isas_of(flags, amx),
        flags=tuple(sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c")))),
        amx=amx,
        threads=limits.processors(),
        cpus_online=os.cpu_count() or 1,
        numa=_numa_nodes(),
        memory_total_bytes=memory.get("MemTotal", 0),
        memory_limit_bytes=limit,
        memory_available_bytes=available,
        huge_pages=_selected(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        huge_pages_free=memory.get("HugePages_Free", 0),
        system=f"{platform.system()} {platform.release()}",
        versions=versions(),
        cpu_quota=0.0 if math.isinf(quota) else quota,
    )


def isas_of(flags: frozenset[str], amx: Amx) -> tuple[str, ...]:
    """The instruction sets that a CPU with `flags` runs, best first; AMX also needs the kernel, or the emulation."""
    found = []
    for isa, needed in ISA_FLAGS.items():
        runs = all(flag in flags for flag in needed)
        if isa == AMX:
            runs = (runs and amx.kernel) or amx.emulated
        if runs:
            found.append(isa)
    return tuple(found)


def amx_state(flags: frozenset[str] | None = None) -> Amx:
    """Whether AMX can be used here and, if not, what is missing. Asks the kernel; requests nothing."""
    if flags is None:
        flags = _cpuinfo()[1]
    bit = 1 << XFEATURE_XTILEDATA
    return Amx(
        cpu="amx_tile" in flags and "amx_bf16" in flags,
        kernel=bool(_arch_prctl(ARCH_GET_XCOMP_SUPP) & bit),
        permitted=bool(_arch_prctl(ARCH_GET_XCOMP_PERM) & bit),
        emulated=os.environ.get(EMULATION_VARIABLE) == "1",
    )


def emulation_hint(isas: Sequence[str]) -> str:
    """How to run the AMX kernels where only `isas` run; "" where nothing helps: around the tiles is AVX-512 code."""
    if AMX in isas or AVX512_BF16 not in isas:
        return ""
    return f"{EMULATION_VARIABLE}=1 emulates the tile instructions: right results, very slow"


def versions() -> dict[str, str]:
    """Versions of Python, ktverify, the reported packages and the C++ compiler; what is not installed is left out."""
    packages = {name: package_version(name) for name in ("ktverify", *REPORTED_PACKAGES)}
    found = {"python": platform.python_version(), **packages, "compiler": compiler_version()}
    return {name: version for name, version in found.items() if version}


def package_version(name: str) -> str:
    """The installed version of a package by its distribution name, or "". Imports nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def compiler_version() -> str:
    """The first line of `$CXX --version` (or of g++, c++, clang++), or "" where there is no compiler."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name) and (line := _output([name, "--version"]).partition("\n")[0]):
            return line.strip()
    return ""


def git_commit() -> str:
    """The commit of this package, with "+changes" if tracked files differ; "" outside a checkout."""
    here = Path(__file__).resolve().parent
    # an installed copy may lie in another project's checkout; a tracked file proves that the checkout is ours
    if not _output(["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name]):
        return ""
    commit = _output(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]).strip()
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{commit}+changes" if commit and changed else commit


def _arch_prctl(code: int) -> int:
    """The bit mask that arch_prctl(code) fills in; 0 where the kernel or the architecture does not know it."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return 0
    mask = ctypes.c_uint64(0)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    failed = libc.syscall(ctypes.c_long(_SYS_ARCH_PRCTL_X86_64), ctypes.c_long(code), ctypes.byref(mask))
    return 0 if failed else int(mask.value)


def _cpuinfo() -> tuple[str, frozenset[str]]:
    model, flags = "", frozenset[str]()
    for line in read_text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        key = key.strip()
        if key in ("model name", "Processor", "CPU part") and not model:
            model = value.strip()
        elif key in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return model or platform.processor() or platform.machine(), flags


def _numa_nodes() -> tuple[NumaNode, ...]:
    nodes = []
    for directory in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        words = read_text(directory / "meminfo").partition("MemTotal:")[2].split()
        memory = int(words[0]) * 1024 if words else 0
        nodes.append(NumaNode(int(directory.name[4:]), read_text(directory / "cpulist").strip(), memory))
    return tuple(nodes)


def _selected(path: Path) -> str:
    """The bracketed word of a sysfs choice: "always [madvise] never" -> "madvise"."""
    text = read_text(path)
    return text.partition("[")[2].partition("]")[0] or text.strip()


def _output(command: list[str]) -> str:
    """Standard output of a command, or "" if it fails, is missing or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
