"""Base weights until they are packed: where they are, and whether their memory may be released."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ktverify._native import Layer


class Sources:
    """The base weights until they are packed.

    weights: gate_proj, up_proj [I, H], down_proj [H, I] by slot. mapped: views of mapped files that are never written,
    so that their pages may be released and read again.
    """

    def __init__(self, weights: list[list[torch.Tensor]], slots: list[int], *, mapped: bool) -> None:
        self.weights, self.slots, self.mapped = weights, slots, mapped
        self.name = 0  # the engine's name for these sources
        self.going = False  # being released: what is packed no longer exists here
        self.lock = threading.Lock()  # taken to release them, and to give them to another engine
        tensors = [tensor for matrix in weights for tensor in matrix]
        counts = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
        one_of = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
        self._storages = [(tensor, counts[address]) for address, tensor in one_of.items()]
        ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
        apart = all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        self._may_release = not mapped and apart and all(tensor.is_contiguous() for tensor in tensors)

    def load(self, native: Layer) -> None:
        """Give the engine their addresses. All experts of one matrix have the same strides."""
        gate, up, down = map(self._of_native, self.weights)
        self.name = native.load_weights(gate, up, down, self.slots)

    def _of_native(self, matrix: list[torch.Tensor]) -> tuple[list[int], int, int, bool]:
        row, column = matrix[0].stride()
        return [tensor.data_ptr() for tensor in matrix], row, column, self.mapped

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
