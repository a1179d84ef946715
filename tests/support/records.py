"""Records of imagined results on an imagined machine, and a run of them, for those who read runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ktverify.runs import store
from ktverify.runs.record import (
    AccuracyRecord,
    AnyRecord,
    CheckRecord,
    GateRecord,
    LatencyRecord,
    RunRecord,
    VerdictName,
)
from ktverify.system.machine import Amx, Machine, NumaNode

MACHINE = Machine(
    cpu="Imagined CPU 9000",
    architecture="x86_64",
    isas=("avx512_bf16", "avx2", "scalar"),
    flags=("avx2", "fma"),
    amx=Amx(cpu=False, kernel=False, permitted=False, emulated=False),
    threads=2,
    cpus_online=4,
    numa=(NumaNode(0, "0-1", 12 << 30), NumaNode(1, "2-3", 12 << 30)),
    memory_total_bytes=24 << 30,
    memory_limit_bytes=16 << 30,
    memory_available_bytes=15 << 30,
    huge_pages="madvise",
    huge_pages_free=0,
    system="Linux 6.1",
    versions={"python": "3.11.7", "torch": "2.13.0", "ktverify": "0.1.0", "compiler": "g++ 12.2.0"},
)

# of the first line of a timed run
HEAD: dict[str, Any] = {"stamp": "stamp", "command": "python -m ktverify", "commit": "abc", "machine": MACHINE}


def accuracy(
    rel_l2: float = 2.4e-3,
    budget: float = 4e-3,
    verdict: VerdictName | None = None,
    case: str = "small@seed=0",
    tensor: str = "output",
    isa: str = "avx2",
    family: str = "forward",
) -> AccuracyRecord:
    """A record whose only gate is rel_l2 against `budget`; it passes if that is kept."""
    verdict = verdict or ("PASS" if rel_l2 <= budget else "FAIL")
    gate = GateRecord(gate="rel_l2", value=rel_l2, budget=budget, used=rel_l2 / budget, verdict=verdict)
    return AccuracyRecord(
        family=family,
        engine="native",
        isa=isa,
        verdict=verdict,
        message=f"{verdict} {tensor} rel_l2 {rel_l2:.1e}",
        case=case,
        tensor=tensor,
        mean_rel=rel_l2 * 0.875,
        rel_l2=rel_l2,
        cosine=0.99999712,
        max_abs=0.0123,
        worst_index=(3, 5),
        gates=() if verdict in ("SKIP", "UNSUPPORTED") else (gate,),
        repro=f"python -m ktverify repro '{case}' --isa {isa} --tensor {tensor}",
    )


def latency(samples: tuple[float, ...] = (10.0, 12.0, 11.0, 30.0), isa: str = "avx2") -> LatencyRecord:
    return LatencyRecord(
        family="latency",
        engine="native",
        isa=isa,
        verdict="PASS",
        case="small@seed=0",
        what="forward",
        threads=2,
        samples_ms=samples,
        warmup=5,
        tokens=128,
        flops=23e9,
        bytes=2.3e9,
    )


def check(verdict: VerdictName = "PASS", name: str = "test_refusal[rank]") -> CheckRecord:
    return CheckRecord(family="contract", engine="native", name=name, verdict=verdict, message="the reason")


def write(directory: Path, records: list[AnyRecord], exit_status: int = 0) -> store.Run:
    """A finished run of `records` in `directory`, without its pages."""
    head = RunRecord(
        stamp=directory.name,
        engine="native",
        command="pytest suites/ -n 4",
        commit="0123456789ab",
        machine=MACHINE,
        workers=4,
        started=1000.0,
        finished=1083.5,
        exit_status=exit_status,
    )
    recorder = store.Recorder(directory, worker="gw0")
    for record in (head, *records):
        recorder.add(record)
    return store.load(directory)
