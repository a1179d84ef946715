"""The machines of a plan. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

_READ = 1 << 28  # bytes, well beyond any cache


@dataclass(frozen=True)
class Hardware:
    """Equal machines; all but `machines` is of one of them. Bytes, and bytes or operations per second.

    nodes: NUMA nodes, which share memory, bandwidth and peak evenly. peak: a multiplication and an addition are two
    operations. network: what a machine sends to others. local: what a process sends to others of its machine. gpu_…: of
    one GPU; gpu_memory 0: there is none; gpu_link: between memory and GPU, one way.
    """

    machines: int
    nodes: int
    memory: float
    bandwidth: float
    peak: float
    network: float
    local: float
    gpu_memory: float = 0.0
    gpu_bandwidth: float = 0.0
    gpu_peak: float = 0.0
    gpu_link: float = 0.0

    def __post_init__(self) -> None:
        given = ("gpu_bandwidth", "gpu_peak", "gpu_link")
        missing = [name for name in given if self.gpu_memory and not getattr(self, name)]
        if missing:
            options = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise ValueError(f"--gpu-memory is given, and a GPU is not measured here: give {options} as well")
        if not self.gpu_memory and any(getattr(self, name) for name in given):
            raise ValueError("a GPU's rates are given, and no memory: give --gpu-memory as well")


def measured_limits() -> tuple[float, float]:
    """(bytes per second, operations per second) of this machine with all processors that this process may use: the best
    of five looks, of the best instruction set."""
    from ktverify.bench import ceilings
    from ktverify.system.limits import processors

    looks = [ceilings.measure(processors(), "", _READ) for _ in range(5)]
    return max(float(look["read"]) for look in looks), max(float(look["multiply"]) for look in looks)


class _Nothing(BaseModel):
    """The request to a module that takes none."""


def measured_link() -> float:
    """Bytes per second that one process gives to another of this machine, both at the same time."""
    from ktverify.bench.plan import link
    from ktverify.isolation import process

    return float("".join(process.lines_of(link.__name__, _Nothing())))
