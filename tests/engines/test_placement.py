"""Where the parts of a layer are: `numa_nodes` is checked, and `placement` tells what the kernel says."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.native.placement import PartPlacement
from ktverify.engines.run import build_layer, layer_arguments, run_layer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs

CASE = Case.parse("E=3,k=2,H=64,I=64,T=9,r=4,alpha=8")
NODES = sorted(int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
GUESTS = Path(__file__).parents[2] / "native/tests/numa/run.py"


@pytest.mark.parametrize(
    ("nodes", "error"),
    [
        *((nodes, TypeError) for nodes in ("01", 0, [0.0, 1.0], [True, False], {0: 1})),
        *((nodes, ValueError) for nodes in ([], [0], [0, 0, 0], [0, -1], [0, 64])),
    ],
)
def test_numa_nodes_of_another_kind_are_refused(nodes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^numa_nodes is .* it takes a list of int, the NUMA node of each of 2 parts"):
        KTMoEWrapper(**layer_arguments(CASE, tp=2, numa_nodes=nodes))


def test_a_node_that_is_not_here_is_refused() -> None:
    absent = next(node for node in range(63, -1, -1) if node not in NODES)
    with pytest.raises(ValueError, match=rf"^numa_nodes names node {absent}; it takes nodes with a processor"):
        KTMoEWrapper(**layer_arguments(CASE, tp=1, numa_nodes=[absent]))


@pytest.mark.skipif(not NODES, reason="the system names no NUMA nodes")
def test_bits_do_not_depend_on_nodes_and_the_kernel_tells_the_placement() -> None:
    inputs = make_inputs(CASE)
    wanted = run_layer(build_layer(KTMoEWrapper, CASE, inputs, tp=2), inputs)
    layer = build_layer(KTMoEWrapper, CASE, inputs, tp=2, numa_nodes=[NODES[-1]] * 2)
    found = run_layer(layer, inputs)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    parts = layer.placement()
    assert len(parts) == 2
    assert sum(len(part.workers) for part in parts) == layer.threads
    for part in parts:
        assert part.nodes == ((NODES[-1],) if len(NODES) > 1 else ())
        assert all(set(cpus) <= os.sched_getaffinity(0) for cpus in part.workers)
        assert part.refused or (sum(part.pages["weights"].values()) > 0 and sum(part.pages["lora"].values()) > 0)
    assert copy.deepcopy(layer).spec.numa_nodes == layer.spec.numa_nodes == (NODES[-1],) * 2


def test_a_placement_names_the_share_of_pages_on_its_nodes() -> None:
    part = PartPlacement((1,), ((4, 5), (4, 5)), {"weights": {0: 1, 1: 90}, "lora": {1: 9}})
    assert part.share == 0.99
    assert str(part) == "node 1; CPUs of its workers [4,5] [4,5]; 100 pages, 99.0% of them there"
    anywhere = PartPlacement((), (), {"weights": {0: 3}})
    assert anywhere.share is None
    assert str(anywhere) == "any node; CPUs of its workers none; 3 pages"
    refused = PartPlacement((0, 1), (), {"weights": {}}, "EPERM, Operation not permitted")
    assert refused.share is None
    assert str(refused).endswith("the kernel does not tell where pages are: EPERM, Operation not permitted")


def test_the_guests_name_what_is_missing(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.touch()
    qemu = tmp_path / "bin/qemu-system-x86_64"
    qemu.parent.mkdir()
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    absent = str(tmp_path / "absent")
    for path, image, missing in ((absent, str(kernel), "qemu-system-x86_64"), (str(qemu.parent), absent, "a kernel")):
        environment = {"PATH": path, "KTVERIFY_GUEST_KERNEL": image}
        done = subprocess.run([sys.executable, GUESTS], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done
        assert done.stderr.startswith(f"numa-test: {missing}"), done
        assert "apt-get install qemu-system-x86 linux-image-amd64" in done.stderr
        assert len(done.stderr.splitlines()) == 1
