"""How a model may be divided among machines, NUMA nodes, processes and a GPU. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ktverify.bench.plan.hardware import Hardware


@dataclass(frozen=True)
class Split:
    """ranks: processes that divide the experts and the tokens; parts: tensor parallel degree of each, one part on a
    node; gpu_experts: of each layer, on a GPU of the only process."""

    name: str
    ranks: int = 1
    parts: int = 1
    gpu_experts: int = 0

    def on_a_machine(self, hardware: Hardware) -> int:
        """Its processes on one machine."""
        return -(-self.ranks // hardware.machines)

    def of_a_process(self, hardware: Hardware) -> Hardware:
        """The memory and the rates that one process has: those of its nodes."""
        share = self.parts / hardware.nodes
        return replace(
            hardware,
            memory=share * hardware.memory,
            bandwidth=share * hardware.bandwidth,
            peak=share * hardware.peak,
        )


def splits_of(hardware: Hardware, gpu_experts: int = 0) -> list[Split]:
    """The splits that these machines have; on a GPU, so many experts of each layer."""
    machines, nodes = hardware.machines, hardware.nodes
    found = [Split("one process" if nodes == 1 else "one process, one node")]
    if nodes > 1:
        found.append(Split(f"TP of {nodes} nodes", parts=nodes))
    if machines > 1:
        found.append(Split(f"EP of {machines} machines", ranks=machines, parts=nodes))
    if nodes > 1:
        found.append(Split(f"EP of {machines * nodes} nodes", ranks=machines * nodes))
    if hardware.gpu_memory:
        found.append(Split(f"hybrid, {gpu_experts} on a GPU", parts=nodes, gpu_experts=gpu_experts))
    return found
