"""Measure the tensors that autograd saves between forward and backward of a model.

Device "meta" runs every operation on shapes alone, so that a model of any size can be measured on any machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktverify.bench.transformer.model import Transformer, batch_of
from ktverify.bench.transformer.sizes import ModelSize


def saved_bytes(size: ModelSize, device: str = "cpu") -> int:
    """Bytes of the distinct storages that autograd saves in one forward, without parameters and buffers.

    Several saved tensors may be views of one storage, and one storage may be saved by several operations: it counts
    once, and whole.
    """
    model = Transformer(size, device)
    owned = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in owned:
            # the tensor stays alive, so that no other storage gets its address
            found.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(*batch_of(size, device))
    total = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del loss
    return total


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
