"""What this process may use: processors and memory, also under the limits of control groups and of `ulimit`.

native/src/memory.cpp reads the memory's limits by the same rules. Standard library only.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

# the folder that contains proc/ and sys/; tests name another
ROOT = Path("/")
# of an option that is a number: as seconds or minutes it fits into the clocks of all libraries
LARGEST_NUMBER = 1e8


def read_text(path: Path) -> str:
    """The text of a file of the system, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


# ---- control groups


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each control group of this process and of its parents, the innermost first.

    Inside a container the path is the host's and may not exist; then the mount's root is the group itself.
    """
    mount = ROOT / "sys/fs/cgroup"
    for line in read_text(ROOT / "proc/self/cgroup").splitlines():  # number:controller,…:/path
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            version, bases = 2, (mount, mount / "unified")
        elif controller in controllers.split(","):
            version, bases = 1, (mount / controller, mount / controllers)
        else:
            continue
        for base in bases:
            inner = base / group.lstrip("/")
            for folder in (inner, *inner.parents):
                yield version, folder
                if folder == base:
                    break


def _numbers(path: Path) -> list[int]:
    """The whole numbers in a file; none where it has another word ("max") or cannot be read."""
    words = read_text(path).split()
    return [int(word) for word in words] if all(word.lstrip("-").isdigit() for word in words) else []


# ---- processors


def cpu_quota() -> float:
    """Processors whose time the control groups give to this process, 1.5 for one and a half; inf without a quota."""
    least = math.inf
    for version, folder in _groups("cpu"):
        if version == 2:
            pair = _numbers(folder / "cpu.max")
        else:
            pair = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        # version 1 writes "no quota" as -1
        if len(pair) == 2 and min(pair) > 0:
            least = min(least, pair[0] / pair[1])
    return least


def affinity() -> int:
    """The number of processors that the scheduler may run this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processors() -> int:
    """How many threads of this process can compute at a time: the processors that it may run on, or the quota, rounded
    up, where a control group gives less."""
    quota = cpu_quota()
    return affinity() if math.isinf(quota) else max(1, min(affinity(), math.ceil(quota)))


def limit_libraries() -> None:
    """Hold the OpenMP of libraries that this process and its children load from now on to `processors`: they look at
    the affinity alone. A value that the user chose stays."""
    if processors() < affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(processors()))


# ---- memory


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; the HugePages_ counts are counts."""
    values: dict[str, int] = {}
    for line in read_text(ROOT / "proc/meminfo").splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            values[key] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return values


def cgroup_memory() -> tuple[int, int]:
    """(limit, use) in bytes of the control group above this process that leaves least; (0, 0) without a limit.

    Use without cached files, which a group gives up when memory is asked for.
    """
    found: list[tuple[int, int]] = []
    for version, folder in _groups("memory"):
        limit_name, use_name, prefix = (
            ("memory.max", "memory.current", "")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        )
        limit, use = _numbers(folder / limit_name), _numbers(folder / use_name)
        # version 1 writes "no limit" as a number near 2**63
        if limit and limit[0] < 1 << 60:
            cached = _cached_files(folder / "memory.stat", prefix)
            found.append((limit[0], max(0, use[0] - cached) if use else 0))
    return min(found, key=lambda pair: pair[0] - pair[1], default=(0, 0))


def _cached_files(stat: Path, prefix: str) -> int:
    words = (line.split() for line in read_text(stat).splitlines())
    wanted = (f"{prefix}inactive_file", f"{prefix}active_file")
    return sum(int(word[1]) for word in words if len(word) == 2 and word[0] in wanted)


def available_memory() -> int:
    """Bytes that this process can still take: the least of MemAvailable, what its control groups leave, RLIMIT_AS,
    RLIMIT_DATA, and what is not yet committed where the kernel promises no more than it has."""
    memory = meminfo()
    limit, used = cgroup_memory()
    left = [memory["MemAvailable"]] if "MemAvailable" in memory else []
    left += [limit - used] if limit else []
    if read_text(ROOT / "proc/sys/vm/overcommit_memory").strip() == "2":
        left.append(memory.get("CommitLimit", 0) - memory.get("Committed_AS", 0))
    status = dict(line.split(":", 1) for line in read_text(ROOT / "proc/self/status").splitlines() if ":" in line)
    for kind, key in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY and key in status:
            left.append(soft - 1024 * int(status[key].split()[0]))
    return max(0, min(left, default=1 << 62))


def require_memory(need: float, what: str, instead: str) -> None:
    """MemoryError with both amounts where `need` bytes are more than are available. instead: what would fit."""
    have = available_memory()
    if need > have:
        raise MemoryError(f"{what} needs {format_bytes(need)}, and {format_bytes(have)} are available; {instead}")
