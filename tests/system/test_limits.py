"""What this process may use, from made-up files of the system: processors under a quota, memory under a limit."""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktverify.checks.target import SMALL
from ktverify.cli.doctor import examine
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import layer_arguments
from ktverify.system import limits
from ktverify.system.files import ROOT
from ktverify.system.machine import read_machine
from tests.support.command_line import started

CGROUP = "sys/fs/cgroup"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /, on a machine of 8 processors."""
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(limits, "affinity", lambda: 8)
    return tmp_path


def write(root: Path, groups: str, files: dict[str, str]) -> None:
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"{CGROUP}/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


# name: /proc/self/cgroup, files below /sys/fs/cgroup, quota, processors
QUOTAS: dict[str, tuple[str, dict[str, str], float, int]] = {
    "none": ("0::/a", {"a/cpu.max": "max 100000"}, math.inf, 8),
    "no files": ("0::/a", {}, math.inf, 8),
    "one": ("0::/a", {"a/cpu.max": "100000 100000"}, 1, 1),
    "one and a half is rounded up": ("0::/a", {"a/cpu.max": "150000 100000"}, 1.5, 2),
    "less than one": ("0::/a", {"a/cpu.max": "10000 100000"}, 0.1, 1),
    "more than there are": ("0::/a", {"a/cpu.max": "6400000 100000"}, 64, 8),
    "another period": ("0::/a", {"a/cpu.max": "30000 10000"}, 3, 3),
    "a parent gives less": ("0::/a/b/c", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2, 2),
    "the group gives less": ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, 2, 2),
    "a container, whose path is the host's": ("0::/docker/0f", {"cpu.max": "200000 100000"}, 2, 2),
    "version 1": ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3, 3),
    "version 1, mounted by both names": (
        "4:cpu,cpuacct:/a",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        1,
        1,
    ),
    "version 1 without a quota": ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}, math.inf, 8),
    "version 1, a parent": (
        "1:name=systemd:/\n4:cpu:/a/b",
        {
            "cpu/a/b/cpu.cfs_quota_us": "-1",
            "cpu/a/b/cpu.cfs_period_us": "100000",
            "cpu/a/cpu.cfs_quota_us": "200000",
            "cpu/a/cpu.cfs_period_us": "100000",
        },
        2,
        2,
    ),
    "both versions": (
        "4:cpu:/a\n0::/b",
        {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000", "unified/b/cpu.max": "400000 100000"},
        4,
        4,
    ),
    "another controller": ("4:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"}, math.inf, 8),
    "a broken file": ("0::/a", {"a/cpu.max": "many"}, math.inf, 8),
}


@pytest.mark.parametrize("what", QUOTAS)
def test_a_quota_holds_the_processors(system: Path, what: str) -> None:
    groups, files, quota, processors = QUOTAS[what]
    write(system, groups, files)
    assert limits.cpu_quota() == quota
    assert limits.processors() == processors


def test_everything_goes_by_the_quota(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(system, "0::/", {"cpu.max": "100000 100000"})
    assert layer_arguments(SMALL)["cpuinfer_threads"] == 1
    assert KTMoEWrapper(**layer_arguments(SMALL, threads=64)).threads == 1
    here = read_machine()
    assert (here.threads, here.cpu_quota) == (1, 1.0)
    lines = [fact.text for fact in examine(here) if fact.name == "threads"]
    assert len(lines) == 1
    assert re.fullmatch(
        r"a control group's quota .* 1 of \d+ CPUs; at most 1 of its threads compute at a time", lines[0]
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limits.limit_libraries()
    assert started("-c", "import torch; print(torch.get_num_threads())").stdout == "1\n"


def test_no_other_code_counts_processors() -> None:
    """Only these may ask for the affinity: limits; the key of a hosted process, and the watcher that gives it this
    affinity; the check that cuts the affinity."""
    found = {
        path.relative_to(ROOT / "ktverify").as_posix()
        for path in (ROOT / "ktverify").rglob("*.py")
        if "sched_getaffinity" in path.read_text(encoding="utf-8")
    }
    assert found == {"system/limits.py", "isolation/hosted.py", "isolation/watcher.py", "checks/processes.py"}


# ---- memory


def test_cached_files_do_not_count_as_used(system: Path) -> None:
    files = {"memory.max": "1000", "memory.current": "900", "a/memory.max": "max", "a/memory.current": "1"}
    stat = "anon 5\ninactive_file 300\nactive_file 100\nslab_reclaimable 7"
    files |= {"a/b/memory.max": "700", "a/b/memory.current": "600", "a/b/memory.stat": stat}
    write(system, "0::/a/b", files)
    assert limits.cgroup_memory() == (1000, 900)
    write(system, "0::/a/b\n1:cpu:/", files)
    assert limits.cgroup_memory() == (1000, 900)
    files["memory.stat"] = "inactive_file 700\nactive_file 100"
    write(system, "0::/a/b", files)
    assert limits.cgroup_memory() == (700, 200)
    write(system, "0::/no/such", files)
    assert limits.cgroup_memory() == (1000, 100)


def test_the_first_version_of_control_groups(system: Path) -> None:
    stat = "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 30"
    folder = "memory/a/memory"
    files = {f"{folder}.limit_in_bytes": "500", f"{folder}.usage_in_bytes": "400", f"{folder}.stat": stat}
    files |= {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "400"}
    write(system, "4:cpu,memory:/a\n5:cpuset:/a", files)
    assert limits.cgroup_memory() == (500, 350)
    write(system, "5:cpuset:/a", files)
    assert limits.cgroup_memory() == (0, 0)


@pytest.fixture
def soft_limits() -> Iterator[None]:
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    before = {kind: resource.getrlimit(kind) for kind in kinds}
    yield
    for kind, limit in before.items():
        resource.setrlimit(kind, limit)


@pytest.mark.usefixtures("soft_limits")
def test_the_least_of_all_limits_is_available(system: Path) -> None:
    write(system, "0::/", {})
    (system / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    (system / "proc/self/status").write_text("VmSize:\t 9000000 kB\nVmData:\t 8000000 kB\n")
    assert limits.available_memory() == 5000 << 10
    write(system, "0::/", {"memory.max": f"{9000 << 10}", "memory.current": f"{5000 << 10}"})
    assert limits.available_memory() == 4000 << 10
    for kind, used, left in ((resource.RLIMIT_DATA, 8000000, 3000), (resource.RLIMIT_AS, 9000000, 2000)):
        resource.setrlimit(kind, ((used + left) << 10, resource.getrlimit(kind)[1]))
        assert limits.available_memory() == left << 10
    (system / "proc/sys/vm").mkdir(parents=True)
    (system / "proc/sys/vm/overcommit_memory").write_text("2\n")
    with (system / "proc/meminfo").open("a") as stream:
        stream.write("CommitLimit: 7000 kB\nCommitted_AS: 6000 kB\n")
    assert limits.available_memory() == 1000 << 10
    with pytest.raises(MemoryError, match=r"it needs 1\.0 GiB, and 1000\.0 KiB are available; make it small"):
        limits.require_memory(1 << 30, "it", "make it small")
