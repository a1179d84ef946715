"""Where the tensor-parallel parts of a layer are: on which NUMA nodes, as the kernel says."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktverify import _native
from ktverify.engines import argument_checks

KINDS = ("weights", "lora", "saved", "buffers")


@dataclass(frozen=True)
class PartPlacement:
    """One tensor-parallel part.

    nodes: the NUMA nodes that it should be on; () where it may be on any, as on a machine with one.
    workers: for each of its workers the processors that the kernel lets it run on.
    pages: touched pages on each node, {node: count}, of the part's packed weights, LoRA, saved forwards, and of
    buffers that wait for the next call of any layer on the same nodes. What all parts share belongs to part 0.
    refused: the kernel's error where it refuses move_pages, else "". With an error, `pages` is empty.
    """

    nodes: tuple[int, ...]
    workers: tuple[tuple[int, ...], ...]
    pages: Mapping[str, Mapping[int, int]]
    refused: str = ""

    @property
    def share(self) -> float | None:
        """The share of all its pages that is on its nodes, 0 to 1; None where it may be on any node, or has no page."""
        counts = [(node, count) for kind in self.pages.values() for node, count in kind.items()]
        total = sum(count for _, count in counts)
        return sum(count for node, count in counts if node in self.nodes) / total if self.nodes and total else None

    def __str__(self) -> str:
        where = f"node {','.join(map(str, self.nodes))}" if self.nodes else "any node"
        workers = " ".join(f"[{','.join(map(str, cpus))}]" for cpus in self.workers) or "none"
        if self.refused:
            return f"{where}; CPUs of its workers {workers}; the kernel does not tell where pages are: {self.refused}"
        total = sum(sum(kind.values()) for kind in self.pages.values())
        share = "" if self.share is None else f", {self.share:.1%} of them there"
        return f"{where}; CPUs of its workers {workers}; {total} pages{share}"


def placement_of(layer: Any) -> tuple[PartPlacement, ...]:
    """The placement of each tensor-parallel part of this layer, as the kernel reports it for every page and worker."""
    return tuple(_part(found) for found in layer._native.placement())


def require_numa_nodes(nodes: Any, parts: int) -> tuple[int, ...]:
    """The NUMA node of each tensor-parallel part, checked. TypeError, ValueError, also for a node that is not here."""
    checked = argument_checks.check_numa_nodes(nodes, parts)
    _native.require_numa_nodes(checked)
    return checked


def _part(found: Mapping[str, Any]) -> PartPlacement:
    error: int = found["error"]
    workers: Sequence[Sequence[int]] = found["workers"]
    return PartPlacement(
        nodes=tuple(found["nodes"]),
        workers=tuple(tuple(cpus) for cpus in workers),
        pages={kind: {} if error else found[kind] for kind in KINDS},
        refused=f"{errno.errorcode.get(error, error)}, {os.strerror(error)}" if error else "",
    )
