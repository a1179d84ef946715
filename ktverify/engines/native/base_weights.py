"""Base weights between being given and being packed: whose they are, and whether their memory may go."""

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
    """Where the base weights are until they are packed.

    weights: gate_proj, up_proj [I, H], down_proj [H, I] by slot. mapped: views of files that are mapped and never
    written: their pages may go and come back."""

    def __init__(self, weights: list[list[torch.Tensor]], slots: list[int], *, mapped: bool) -> None:
        self.weights, self.slots, self.mapped = weights, slots, mapped
        self.name = 0  # the engine's, of where it reads them
        self.going = False  # given up: what is packed is no more
        self.lock = threading.Lock()  # held to give them up, and to hand them to another engine
        tensors = [tensor for matrix in weights for tensor in matrix]
        counts = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
        one_of = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
        self._storages = [(tensor, counts[address]) for address, tensor in one_of.items()]
        ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
        apart = all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        self._giveable = not mapped and apart and all(tensor.is_contiguous() for tensor in tensors)

    def load(self, native: Layer) -> None:
        """Tells the engine where they are. Of one matrix all experts have the same strides."""
        gate, up, down = map(self._of_native, self.weights)
        self.name = native.load_weights(gate, up, down, self.slots)

    def _of_native(self, matrix: list[torch.Tensor]) -> tuple[list[int], int, int, bool]:
        row, column = matrix[0].stride()
        return [tensor.data_ptr() for tensor in matrix], row, column, self.mapped

    def given_up(self) -> bool:
        """Whether nobody else can read them: their memory is torch's own, and no other tensor holds it.

        Not so where numpy, a file or anybody else lent the memory, where experts are strided or share memory, and where
        this torch does not tell. Who has a weak reference to the storage finds zeros."""
        if self.going or not self._giveable:
            return self.going
        # as this torch counts one tensor that holds its storage alone
        own = _holders(alias(torch.zeros(1, device="cpu")))
        for tensor, count in self._storages:
            holders = _holders(tensor)
            if own is None or holders is None or holders != (own[0] + count - 1, own[1]):
                return False
        return True


def _holders(tensor: torch.Tensor) -> tuple[int, int] | None:
    """How many hold its storage, in C++ and in Python; None where torch cannot tell, or was lent it."""
    use_count = getattr(torch._C, "_storage_Use_Count", None)
    is_cow = getattr(torch._C, "_is_cow_tensor", None)  # then clones share the memory, and not the storage
    storage = tensor.untyped_storage()
    if use_count is None or is_cow is None or is_cow(tensor):
        return None
    if not storage.resizable() or storage.is_shared() or tensor.is_pinned():
        return None
    return use_count(storage._cdata), sys.getrefcount(storage)


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without the tensor that a view keeps alive."""
    alone = tensor.new_empty(0)
    return alone.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
