"""The engine with more workers than this machine has processors: the same bits, and every call ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ktverify.isolation.process import own_environment

# in place of the C library's: the engine takes no more workers than there are processors
SIXTY_FOUR = """
#include <stddef.h>
#include <string.h>
int sched_getaffinity(int pid, size_t size, unsigned char *set) {
    (void)pid;
    memset(set, 0, size);
    memset(set, 0xff, 8);
    return 0;
}
"""

CHILD = """
import sys
from pathlib import Path
import torch
from ktverify import _native
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import build_layer, layer_arguments, run_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.system import limits

limits.ROOT = Path(sys.argv[1])  # no quota either
_native.read_system_below(sys.argv[1])  # and no NUMA nodes, which would have fewer processors
for text, tp in (("E=40,k=4,H=160,I=64,T=50,r=8", 1), ("E=6,k=3,H=96,I=64,T=37,r=4", 2)):
    case = Case.parse(text)
    inputs = make_inputs(case)
    results = {}
    for workers in (1, 8, 23, 60, 64):
        layer = build_layer(KTMoEWrapper, case, inputs, tp=tp, threads=workers)
        assert layer.threads == workers, (layer.threads, workers)
        for _ in range(3):
            found = run_layer(layer, inputs)
            results.setdefault(1, found)
            different = [name for name, tensor in found.items() if not torch.equal(tensor, results[1][name])]
            assert not different, (text, workers, different)
group = limits.ROOT / "sys/fs/cgroup/a/b"
group.mkdir(parents=True)
(limits.ROOT / "proc/self").mkdir(parents=True)
(limits.ROOT / "proc/self/cgroup").write_text("0::/a/b\\n")
(group / "cpu.max").write_text("400000 100000")
(group.parent / "cpu.max").write_text("200000 100000")
assert limits.affinity() == 64
for threads in (None, 64):
    assert KTMoEWrapper(**layer_arguments(case, threads=threads)).threads == 2
print("the same bits")
"""


def test_64_workers_on_few_processors_give_the_bits_of_one(tmp_path: Path) -> None:
    source, library = tmp_path / "affinity.c", tmp_path / "affinity.so"
    source.write_text(SIXTY_FOUR)
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", library, source], check=True)
    environment = {**own_environment(), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "the same bits\n"), done.stderr
