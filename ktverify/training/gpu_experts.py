"""Which experts of a model a GPU computes: so many of each layer, or those that a mask file lists.

A mask file is JSON: num_experts and gpu_experts, for each layer with routed experts, in the model's order; counts, how
many slots reached each expert, is what `expert-stats` chose them by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ktverify.engines.argument_checks import check_gpu_device
from ktverify.runs.jsonl import to_json
from ktverify.system.files import write_whole
from ktverify.system.text import read_json
from ktverify.training.kt_keys import KtKeys


@dataclass(frozen=True)
class GpuExperts:
    """Experts on `device`: the first `number` of each layer, or `layers`, ids for each layer with routed experts.

    where: the mask file, for errors.
    """

    number: int = 0
    layers: tuple[tuple[int, ...], ...] | None = None
    device: str = "cuda"
    where: str = ""

    def mask(self, layer: int, experts: int) -> list[bool]:
        """bool [E] of a layer, by its place among those with routed experts."""
        there = set(range(self.number)) if self.layers is None else set(self.layers[layer])
        return [expert in there for expert in range(experts)]

    def check(self, sizes: Sequence[int]) -> None:
        """ValueError unless a model whose layers have `sizes` experts has these, RuntimeError without their device."""
        if self.layers is None:
            if self.number > min(sizes):
                raise ValueError(f"kt_num_gpu_experts is {self.number}; a layer of this model has {min(sizes)} experts")
        elif len(self.layers) != len(sizes):
            raise ValueError(f"{self.where} has {len(self.layers)} layers; this model has {len(sizes)} with experts")
        else:
            for layer, (ids, size) in enumerate(zip(self.layers, sizes, strict=True)):
                if ids and ids[-1] >= size:
                    raise ValueError(f"{self.where} has expert {ids[-1]} in layer {layer}, which has {size} experts")
        if self.number or self.layers:
            check_gpu_device(self.device)


ALL_IN_ENGINE = GpuExperts()


def gpu_experts_of(keys: KtKeys) -> GpuExperts:
    """What a configuration names. ValueError for a file that is no mask file, or has another number of experts."""
    path, number = keys.kt_gpu_experts_mask, keys.kt_num_gpu_experts
    if not path:
        return GpuExperts(number, None, keys.kt_gpu_device)
    layers = read_masks(Path(path))
    for layer, ids in enumerate(layers):
        if number not in (0, len(ids)):
            raise ValueError(
                f"kt_num_gpu_experts is {number}, layer {layer} of {path} has {len(ids)}: give one of them"
            )
    return GpuExperts(0, layers, keys.kt_gpu_device, path)


def read_masks(path: Path) -> tuple[tuple[int, ...], ...]:
    """The ids of each layer in a mask file, ascending. ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"kt_gpu_experts_mask {str(path)!r} is no file; python -m ktverify expert-stats writes one")
    found = read_json(path).get("gpu_experts")
    if not isinstance(found, list) or not all(isinstance(ids, list) and _are_ids(ids) for ids in found):
        raise ValueError(f"{path} is no mask file: gpu_experts takes a list of expert ids for each layer")
    return tuple(tuple(sorted(ids)) for ids in found)


def read_counts(path: Path) -> list[list[int]]:
    """How many slots reached each expert of each layer, from a mask file. ValueError for any other file."""
    read_masks(path)
    found = read_json(path).get("counts")
    right = isinstance(found, list) and all(
        isinstance(each, list) and all(type(one) is int and one >= 0 for one in each) for each in found
    )
    if not right or not found:
        raise ValueError(f"{path} has no counts: python -m ktverify expert-stats writes them")
    return list(found)


def _are_ids(ids: list[object]) -> bool:
    return all(type(one) is int and one >= 0 for one in ids) and len(set(ids)) == len(ids)


def most_frequent(counts: Sequence[float], number: int) -> list[int]:
    """The `number` experts with the largest counts, ascending; of equal ones those of the lowest ids."""
    return sorted(sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))[:number])


def write_masks(path: Path, counts: Sequence[Sequence[int]], number: int) -> Path:
    """Write the mask file of the `number` most frequent experts of each layer. ValueError for more than there are."""
    least = min(map(len, counts))
    if not 1 <= number <= least:
        raise ValueError(f"the number of experts is {number}; it takes 1 to {least}, the experts of a layer")
    chosen = [most_frequent(each, number) for each in counts]
    return write_whole(
        path,
        to_json({"num_experts": [len(each) for each in counts], "gpu_experts": chosen, "counts": counts}) + "\n",
    )
