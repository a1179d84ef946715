"""Base weights until they are packed: where they are, and whether their memory may be released.

Also those of a checkpoint in safetensors: tensors that are views of mapped files, of which only the headers are read.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ktverify.engines.argument_checks import LayerSpec, check_base_weights, check_physical_map
from ktverify.engines.quantise import MADE
from ktverify.engines.quantised import Codes, check_codes, check_cut, dequantised, made_codes
from ktverify.spec.names import BASE_NAMES
from ktverify.system.text import read_json

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
    never written, so that their pages may be released and read again; None for tensors in memory. quantised: the
    format, the columns of a group, and whether there are zero points, where the weights are codes with `scales` and
    `zeros`, by matrix and slot.
    """

    def __init__(
        self,
        weights: list[list[torch.Tensor]],
        slots: list[int],
        *,
        files: Iterable[MappedFile] | None = None,
        quantised: tuple[str, int, bool] = ("bf16", 0, False),
        scales: list[list[torch.Tensor]] | None = None,
        zeros: list[list[torch.Tensor]] | None = None,
    ) -> None:
        self.weights, self.slots, self.files = weights, slots, files
        self.quantised, self.scales, self.zeros = quantised, scales or [[], [], []], zeros or [[], [], []]
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
        self.name = native.load_weights(gate, up, down, self.slots, self, self.quantised)

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
        slot, (format, group, zeros) = self.slots.index(expert), self.quantised
        for number, matrix in enumerate(to):
            weight = self.weights[number][slot]
            if format != "bf16":
                zero_points = self.zeros[number][slot] if zeros else None
                weight = dequantised(format, group, weight, self.scales[number][slot], zero_points)
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
            if self.quantised[0] in ("int4", "mxfp4"):  # in weights, not in bytes
                row *= 2 * matrices[0][0].itemsize
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
    return _sources_of_codes(check_codes(spec, weights, scales, zero_points), slots)


def _sources_of_codes(found: Codes, slots: list[int]) -> Sources:
    zeros = found.zero_points
    return Sources(
        _by_slot(found.codes),
        slots,
        quantised=(found.format, found.group, zeros is not None),
        scales=_by_slot(found.scales),
        zeros=None if zeros is None else _by_slot(zeros),
    )


def _by_slot(matrices: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[alias(expert) for expert in tensor] for tensor in matrices.values()]


# ---- checkpoints


def sources_in_files(spec: LayerSpec, slots: list[int]) -> Sources:
    """The Sources of layer spec.layer_idx in the checkpoint at spec.weight_path. Errors as expert_weights."""
    if spec.weight_format not in ("bf16", *MADE):
        raise NotImplementedError(
            f"method is {spec.method!r}; load_weights reads bf16 checkpoints: give the codes and scales to "
            "load_weights_from_tensors"
        )
    base, files = expert_weights(str(spec.weight_path), spec.layer_idx, spec.expert_shapes, spec.num_experts)
    if spec.weight_format == "bf16":
        return Sources(list(base.values()), slots, files=files)
    check_cut(spec, MADE[spec.weight_format])
    return _sources_of_codes(made_codes(spec, base), slots)


def expert_weights(
    weight_path: str, layer: int, shapes: Mapping[str, tuple[int, int]], experts: int
) -> tuple[dict[str, list[torch.Tensor]], list[MappedFile]]:
    """gate_proj, up_proj [I, H], down_proj [H, I] bf16 of each expert, by BASE_NAMES, and the files that they are views
    of; shapes: the expected ones.

    A checkpoint may have several towers of layers. Those of _OTHER_TOWERS are never taken; of the others, one alone may
    have routed experts, and a layer that predicts further tokens is none of the decoder's. ValueError for two towers or
    files that have the experts, a missing path or tensor, another shape, or more experts; TypeError for another dtype.
    """
    tensors, where = _tensors(weight_path), f"weight_path {weight_path!r}"
    tower, family = _decoder(tensors, where, layer)
    first = FAMILIES[family][BASE_NAMES[0]]
    if f"{tower}{first.format(layer=layer, expert=experts)}" in tensors:
        raise ValueError(f"{where}, layer {layer}, has more experts than num_experts ({experts})")
    files: dict[Path, MappedFile] = {}
    weights = {
        name: [
            _view(files, tensors, f"{tower}{pattern.format(layer=layer, expert=expert)}", shapes[name], where)
            for expert in range(experts)
        ]
        for name, pattern in FAMILIES[family].items()
    }
    return weights, list(files.values())


# parts of the names of towers that are not the decoder, as mtp in mtp.layers.0 and talker in talker.model.layers.0
_OTHER_TOWERS = re.compile(
    r"(^|[._])(mtp|nextn|vision|visual|vit|image|audio|speech|talker|code2wav|code_predictor|encoder|draft|eagle|medusa)"
)
# tensors that only a layer has which predicts further tokens
_FURTHER_TOKENS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")


def _decoder(tensors: Mapping[str, list[Path]], where: str, layer: int) -> tuple[str, str]:
    """What stands before "layers.N." in the names of the decoder, and its family. ValueError where it is not one."""
    patterns = {}
    for family, names in FAMILIES.items():
        numbered = re.escape(names[BASE_NAMES[0]]).replace(r"\{layer\}", r"(0|[1-9]\d*)")
        patterns[family] = re.compile(r"((?:.*\.)?)" + numbered.replace(r"\{expert\}", r"\d+"))
    towers: dict[str, dict[int, dict[str, str]]] = {}  # prefix -> layer -> family -> the first expert's name
    for name in tensors:
        for family, pattern in patterns.items():
            if found := pattern.fullmatch(name):
                towers.setdefault(found[1], {}).setdefault(int(found[2]), {}).setdefault(family, name)
    chosen = {prefix: layers for prefix, layers in towers.items() if not _OTHER_TOWERS.search(prefix)}
    prefix, layers = next(iter(chosen.items()), ("", {}))
    rivals = [next(iter(found[min(found)].values())) for found in chosen.values()]
    if len(rivals) < 2:
        rivals = list(layers.get(layer, {}).values())
    if len(rivals) > 1:
        raise ValueError(f"{where} has routed experts twice, either may be the decoder's: {rivals[0]}, {rivals[1]}")
    if layer not in layers:
        wanted = " or ".join(names[BASE_NAMES[0]].format(layer=layer, expert=0) for names in FAMILIES.values())
        others = [name for found in towers.values() for name in found.get(layer, {}).values()]
        also = f"; {others[0]} is not the decoder's" if others else ""
        raise ValueError(f"{where} holds no routed experts of layer {layer}: no {wanted}{also}")
    only_theirs = tuple(f"{prefix}layers.{layer}.{part}" for part in _FURTHER_TOKENS)
    further = next((name for name in tensors if name.startswith(only_theirs)), "")
    if further:
        raise ValueError(
            f"{where}: layer {layer} predicts further tokens ({further}), it is none of the decoder's; "
            f"those with routed experts are {min(layers)} to {layer - 1}"
        )
    return prefix, next(iter(layers[layer]))


def _tensors(weight_path: str) -> dict[str, list[Path]]:
    """The files of each tensor, by its full name; an index names one for each."""
    path = Path(weight_path).expanduser()
    if not weight_path or not path.exists():
        raise ValueError(f"weight_path is {weight_path!r}; it takes a safetensors file or a folder of them")
    if path.is_file():
        return {name: [path] for name in _keys(path)}
    if (path / INDEX).is_file():
        return {name: [path / file] for name, file in read_index(path / INDEX).items()}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"weight_path {weight_path!r} has no *.safetensors; it takes a safetensors file or a folder")
    found: dict[str, list[Path]] = {}
    for file in files:
        for name in _keys(file):
            found.setdefault(name, []).append(file)
    return found


def read_index(path: Path) -> dict[str, str]:
    """weight_map of an index: the file beside it of each tensor. ValueError, with the index, for anything else."""
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict):
        raise ValueError(f"{path} has no weight_map; it takes the file of each tensor")
    for name, file in listed.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file:
            raise ValueError(f"{path}: the file of {name} is {file!r}; it takes the name of a file beside it")
    return listed


def _keys(file: Path) -> Iterable[str]:
    try:
        with safe_open(file, "pt") as opened:
            keys: list[str] = list(opened.keys())
    except Exception as error:  # the library raises exceptions of its own and others
        raise ValueError(f"{file} is no safetensors file: {error}") from None
    return keys


def _view(
    files: dict[Path, MappedFile], tensors: Mapping[str, list[Path]], name: str, shape: tuple[int, int], where: str
) -> torch.Tensor:
    """A tensor that reads its pages from the file when they are used."""
    if name not in tensors:
        raise ValueError(f"{where} has no {name}")
    if len(tensors[name]) > 1:
        twice = " and ".join(file.name for file in tensors[name][:2])
        raise ValueError(f"{where} has {name} in {twice}, and no {INDEX} that says which; remove one")
    file = tensors[name][0]
    if file not in files:
        if not file.is_file():
            raise ValueError(f"{INDEX} names {file.name}, which is not in {str(file.parent)!r}")
        _keys(file)  # ValueError where it is no safetensors file
        files[file] = MappedFile(file)
    try:
        tensor = files[file].tensor(name)
    except SafetensorError:
        raise ValueError(f"{INDEX} says that {name} is in {file.name}, which does not have it") from None
    if tensor.dtype is not torch.bfloat16:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it takes torch.bfloat16")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; the layer takes {list(shape)}")
    return tensor
