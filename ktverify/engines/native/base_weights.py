"""Base weights until they are packed: where they are, and whether their memory may be released.

Also those of a checkpoint in safetensors: tensors that are views of mapped files, of which only the headers are read.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from ktverify.spec.names import BASE_NAMES

if TYPE_CHECKING:
    from ktverify._native import Layer

INDEX = "model.safetensors.index.json"

# names of an expert's matrices in model families, after any prefix
FAMILIES: dict[str, dict[str, str]] = {
    "DeepSeek, Qwen, GLM, OLMoE": {
        name: f"layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight" for name in BASE_NAMES
    },
    "Mixtral": {
        name: f"layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{short}.weight"
        for name, short in zip(BASE_NAMES, ("w1", "w3", "w2"), strict=True)
    },
}


class Sources:
    """The base weights until they are packed. The engine owns this object until then, and reads by address.

    weights: gate_proj, up_proj [I, H], down_proj [H, I] by slot. files: those that the weights are views of, which are
    never written, so that their pages may be released and read again; None for tensors in memory.
    """

    def __init__(
        self, weights: list[list[torch.Tensor]], slots: list[int], *, files: Iterable[MappedFile] | None = None
    ) -> None:
        self.weights, self.slots, self.files = weights, slots, files
        self.name = 0  # the engine's name for these sources
        self.going = False  # being released: what is packed no longer exists here
        tensors = [tensor for matrix in weights for tensor in matrix]
        counts = Counter(tensor.untyped_storage()._cdata for tensor in tensors)
        one_of = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
        self._storages = [(tensor, counts[storage]) for storage, tensor in one_of.items()]
        self._places = self._places_now()
        ends = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
        apart = all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        self._may_release = files is None and apart and all(tensor.is_contiguous() for tensor in tensors)

    def load(self, native: Layer) -> None:
        """Give the engine their addresses, and this object to keep. All experts of a matrix have the same strides."""
        gate, up, down = map(self._of_native, self.weights)
        self.name = native.load_weights(gate, up, down, self.slots, self)

    def before_packing(self, native: Layer) -> int:
        """The name of these sources where the engine may release them while it packs them, else 0.

        Gives the engine the present addresses: `share_memory_`, `Module.share_memory` and a queue of multiprocessing
        move a storage that others refer to. RuntimeError where a storage, OSError where a file has become shorter,
        before its memory is read."""
        for file in self.files or ():
            file.check()
        places = self._places_now()
        if places != self._places:
            if any(now < before for (_, now), (_, before) in zip(places, self._places, strict=True)):
                raise RuntimeError(
                    "the base weights were resized before all experts were packed; an expert is packed when its first "
                    "token arrives: call load_weights_from_tensors again"
                )
            native.move_weights(self.name, *map(self._of_native, self.weights))
            self._places = places
        self.going = self.released()
        return self.name if self.going else 0

    def _places_now(self) -> list[tuple[int, int]]:
        """Address and bytes of each storage."""
        storages = [tensor.untyped_storage() for tensor, _ in self._storages]
        return [(storage.data_ptr(), storage.nbytes()) for storage in storages]

    def _of_native(self, matrix: list[torch.Tensor]) -> tuple[list[int], int, int, bool]:
        row, column = matrix[0].stride()
        return [tensor.data_ptr() for tensor in matrix], row, column, self.files is not None

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


class MappedFile:
    """A safetensors file that is mapped; its tensors read their pages when they are used.

    A page beyond the end of a file ends the process (SIGBUS). So the size is compared before pages are read; the file
    is held open for that, because a file that replaced it under its name says nothing of the mapped one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        self._opened = safe_open(path, "pt")

    def check(self) -> None:
        """OSError if the file has become shorter."""
        size = os.fstat(self._file).st_size
        if size < self._size:
            raise OSError(
                f"{self.path} has {size} bytes, and had {self._size} when it was loaded: write it again, and call "
                "load_weights again"
            )

    def tensor(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._opened.get_tensor(name)  # type: ignore[no-untyped-call]
        return found


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


# ---- checkpoints


def expert_weights(
    weight_path: str, layer: int, shapes: Mapping[str, tuple[int, int]], experts: int
) -> tuple[dict[str, list[torch.Tensor]], list[MappedFile]]:
    """gate_proj, up_proj [I, H], down_proj [H, I] bf16 of each expert, by BASE_NAMES, and the files that they are views
    of; shapes: the expected ones.

    ValueError for a missing path or tensor, another shape, or more experts; TypeError for another dtype.
    """
    names = _of_layer(_tensors(weight_path), layer)
    family = next((f for f in FAMILIES.values() if f[BASE_NAMES[0]].format(layer=layer, expert=0) in names), None)
    if family is None:
        wanted = " or ".join(f[BASE_NAMES[0]].format(layer=layer, expert=0) for f in FAMILIES.values())
        raise ValueError(f"weight_path {weight_path!r} holds no routed experts of layer {layer}: no {wanted}")
    if family[BASE_NAMES[0]].format(layer=layer, expert=experts) in names:
        raise ValueError(f"weight_path {weight_path!r}, layer {layer}, has more experts than num_experts ({experts})")
    files: dict[Path, MappedFile] = {}
    weights = {
        name: [
            _view(files, names, pattern.format(layer=layer, expert=expert), shapes[name], weight_path)
            for expert in range(experts)
        ]
        for name, pattern in family.items()
    }
    return weights, list(files.values())


def _tensors(weight_path: str) -> dict[str, Path]:
    """The file of each tensor, by its full name."""
    path = Path(weight_path).expanduser()
    if not weight_path or not path.exists():
        raise ValueError(f"weight_path is {weight_path!r}; it takes a safetensors file or a folder of them")
    if path.is_file():
        return dict.fromkeys(_keys(path), path)
    if (path / INDEX).is_file():
        listed: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: path / file for name, file in listed.items()}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"weight_path {weight_path!r} has no *.safetensors; it takes a safetensors file or a folder")
    return {name: file for file in files for name in _keys(file)}


def _keys(file: Path) -> Iterable[str]:
    try:
        with safe_open(file, "pt") as opened:
            keys: list[str] = list(opened.keys())
    except Exception as error:  # the library raises exceptions of its own and others
        raise ValueError(f"{file} is no safetensors file: {error}") from None
    return keys


def _of_layer(tensors: Mapping[str, Path], layer: int) -> dict[str, tuple[str, Path]]:
    """The tensors of one layer: name from "layers.N." on -> (full name, file)."""
    pattern = re.compile(rf"(?:^|\.)(layers\.{layer}\..*)")
    return {match[1]: (name, file) for name, file in tensors.items() if (match := pattern.search(name))}


def _view(
    files: dict[Path, MappedFile],
    names: Mapping[str, tuple[str, Path]],
    name: str,
    shape: tuple[int, int],
    weight_path: str,
) -> torch.Tensor:
    """A tensor that reads its pages from the file when they are used."""
    if name not in names:
        raise ValueError(f"weight_path {weight_path!r} has no {name}")
    full, file = names[name]
    if file not in files:
        if not file.is_file():
            raise ValueError(f"{INDEX} names {file.name}, which is not in {weight_path!r}")
        files[file] = MappedFile(file)
    tensor = files[file].tensor(full)
    if tensor.dtype is not torch.bfloat16:
        raise TypeError(f"{full} has dtype {tensor.dtype}; it takes torch.bfloat16")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{full} has shape {list(tensor.shape)}; the layer takes {list(shape)}")
    return tensor
