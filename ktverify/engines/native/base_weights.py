"""Base weights until they are packed: where they are, and whether their memory may be released."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ktverify.engines.argument_checks import LayerSpec, check_base_weights, check_physical_map
from ktverify.engines.checkpoint_files import MappedFile
from ktverify.engines.quantised import Codes, WeightFormat, check_codes, dequantised, weight_format_of
from ktverify.spec.names import BASE_NAMES

if TYPE_CHECKING:
    from ktverify._native import Layer


class Sources:
    """The base weights until they are packed. The engine owns this object until then, and reads by address.

    weights: gate_proj, up_proj [I, H], down_proj [H, I] by slot. files: those that the weights are views of, which are
    never written, so that their pages may be released and read again; None for tensors in memory. format: how the
    weights are stored; codes have `scales` and `zeros`, by matrix and slot.
    """

    def __init__(
        self,
        weights: list[list[torch.Tensor]],
        slots: list[int],
        *,
        files: Iterable[MappedFile] | None = None,
        format: WeightFormat | None = None,
        scales: list[list[torch.Tensor]] | None = None,
        zeros: list[list[torch.Tensor]] | None = None,
    ) -> None:
        self.weights, self.slots, self.files = weights, slots, files
        self.format, self.scales, self.zeros = format or WeightFormat(), scales or [[], [], []], zeros or [[], [], []]
        self.name = 0  # the engine's name for these sources
        self.going = False  # being released: what is packed no longer exists here
        tensors = [tensor for matrix in (*weights, *self.scales, *self.zeros) for tensor in matrix]
        counts = Counter(tensor.untyped_storage()._cdata for tensor in tensors)
        one_of = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
        self._storages = [(tensor, counts[storage]) for storage, tensor in one_of.items()]
        self._places = self._places_now()
        ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
        apart = all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        self._may_release = files is None and apart and all(tensor.is_contiguous() for tensor in tensors)

    def load(self, native: Layer) -> None:
        """Give the engine their addresses, and this object to keep. All experts of a matrix have the same strides."""
        gate, up, down = self._all_of_native()
        self.name = native.load_weights(gate, up, down, self.slots, self, self.format)

    def before_packing(self, native: Layer) -> int:
        """The name of these sources where the engine may release them while it packs them, else 0.

        Gives the engine the present addresses: `share_memory_`, `Module.share_memory` and a queue of multiprocessing
        move a storage that others refer to. RuntimeError where a storage, OSError where a file has become shorter,
        before its memory is read."""
        places = self._checked_places()
        if places != self._places:
            native.move_weights(self.name, *self._all_of_native())
            self._places = places
        self.going = self.released()
        return self.name if self.going else 0

    def read(self, expert: int, to: list[torch.Tensor]) -> None:
        """Copy a logical expert's gate_proj, up_proj, down_proj. Errors as before_packing."""
        self._checked_places()
        slot, of = self.slots.index(expert), self.format
        for number, matrix in enumerate(to):
            weight = self.weights[number][slot]
            if of.format != "bf16":
                zero_points = self.zeros[number][slot] if of.zeros else None
                weight = dequantised(of.format, of.group, weight, self.scales[number][slot], zero_points)
            matrix.copy_(weight)

    def _checked_places(self) -> list[tuple[int, int]]:
        for file in self.files or ():
            file.check()
        places = self._places_now()
        if any(now < before for (_, now), (_, before) in zip(places, self._places, strict=True)):
            raise RuntimeError(
                "the base weights were resized before all experts were packed; an expert is packed when its first "
                "token arrives: call load_weights_from_tensors again"
            )
        return places

    def _places_now(self) -> list[tuple[int, int]]:
        """Address and bytes of each storage."""
        storages = [tensor.untyped_storage() for tensor, _ in self._storages]
        return [(storage.data_ptr(), storage.nbytes()) for storage in storages]

    def _all_of_native(self) -> list[tuple[list[int], int, int, bool, list[int], list[int]]]:
        found = []
        for matrices in zip(self.weights, self.scales, self.zeros, strict=True):
            weights, scales, zeros = ([tensor.data_ptr() for tensor in matrix] for matrix in matrices)
            row, column = matrices[0][0].stride()
            if self.format.format in ("int4", "mxfp4"):  # in weights, not in elements
                row *= 2 * matrices[0][0].itemsize
            elif self.format.offset:
                row *= matrices[0][0].itemsize
            found.append((weights, row, column, self.files is not None, scales, zeros))
        return found

    def released(self) -> bool:
        """Whether their memory may be released: it is torch's own, and no other tensor uses it.

        False where the memory belongs to numpy, a file or another library, where experts are strided or share memory,
        and where this version of torch does not report it. A weak reference to the storage finds zeros afterwards.
        """
        if self.going or not self._may_release:
            return self.going
        # the counts of a tensor that is the only owner of its storage, in this version of torch
        own = _holders(alias(torch.zeros(1, device="cpu")))
        for tensor, count in self._storages:
            holders = _holders(tensor)
            if own is None or holders is None or holders != (own[0] + count - 1, own[1]):
                return False
        return True


def _holders(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Owners of its storage, in C++ and in Python; None where torch does not report them, or the memory is borrowed."""
    use_count = getattr(torch._C, "_storage_Use_Count", None)
    is_cow = getattr(torch._C, "_is_cow_tensor", None)  # then clones share the memory, but not the storage
    storage = tensor.untyped_storage()
    if use_count is None or is_cow is None or is_cow(tensor):
        return None
    if not storage.resizable() or storage.is_shared() or tensor.is_pinned():
        return None
    return use_count(storage._cdata), sys.getrefcount(storage)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same memory that does not keep the tensor alive of which this is a view."""
    alone = tensor.new_empty(0)
    return alone.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def sources_of(
    spec: LayerSpec, weights: Sequence[Any], physical_map: Any, scales: Any = None, zero_points: Any = None
) -> Sources:
    """The Sources of the arguments of load_weights_from_tensors, which are checked."""
    if spec.weight_format == "bf16":
        if scales is not None or zero_points is not None:
            raise TypeError(f"scales or zero_points were given; method {spec.method} takes bf16 weights alone")
        base = check_base_weights(spec, *weights)
        return Sources(_by_slot(base), check_physical_map(spec, physical_map))
    slots = check_physical_map(spec, physical_map)
    return sources_of_codes(check_codes(spec, weights, scales, zero_points), slots)


def sources_of_codes(found: Codes, slots: list[int]) -> Sources:
    """The Sources of codes by the checkpoint's or the caller's slots."""
    zeros, name = found.zero_points, BASE_NAMES[0]
    points = None if zeros is None else zeros[name]
    return Sources(
        _by_slot(found.codes),
        slots,
        format=weight_format_of(found.format, found.group, found.codes[name], found.scales[name], points),
        scales=_by_slot(found.scales),
        zeros=None if zeros is None else _by_slot(zeros),
    )


def _by_slot(matrices: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[alias(expert) for expert in tensor] for tensor in matrices.values()]
