"""What a checkpoint's config.json says of its quantised weights, and whether a stored matrix agrees with it.

transformers' quantization_config of FP8 and the config_groups of compressed-tensors are read. Where config.json says
nothing of a matrix, the files decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktverify.engines.argument_checks import shown
from ktverify.engines.weight_files import WEIGHT, StoredMatrix
from ktverify.system.text import read_json

# lists of modules that are not quantised: compressed-tensors', transformers'
_LEFT_OUT = ("ignore", "modules_to_not_convert")
FP8, COMPRESSED = "fp8", "compressed-tensors"
# quant_method -> the formats of matrices that it may stand beside; of any other method the files decide. DeepSeek-V4
# says fp8 and has experts in MXFP4; the methods without a format have tensors of other names
_FORMATS: dict[str, tuple[str, ...]] = {
    FP8: ("fp8", "mxfp4"),
    "mxfp4": ("mxfp4",),
    COMPRESSED: ("int4", "int8", "fp8"),
    **dict.fromkeys(("gptq", "awq", "bitsandbytes"), ()),
}
# keys that one method alone has
_KEY_OF = {"config_groups": COMPRESSED, "weight_block_size": FP8}
_E4M3 = ("e4m3", "e4m3fn", "float8_e4m3fn")  # MiniMax-M2 has the last


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _are_sizes(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_size, value))


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_string, value))


_Rules = Mapping[str, tuple[Callable[[object], bool], str]]
# key -> whether a value is right, and what it takes; null is right everywhere
_KEYS: _Rules = {
    "fmt": (_is_string, "a string"),
    "format": (_is_string, "a string"),
    "weight_block_size": (_are_sizes, "two whole numbers above 0, the rows and columns of a block"),
    **dict.fromkeys(_LEFT_OUT, (_are_names, "a list of names of modules")),
}
_OF_WEIGHTS: _Rules = {
    "type": (_is_string, "a string"),
    "strategy": (_is_string, "a string"),
    "num_bits": (_is_size, "a whole number above 0"),
    "group_size": (
        lambda value: _is_size(value) or (type(value) is int and value == -1),
        "a whole number above 0, or -1 for a whole row",
    ),
    "symmetric": (lambda value: isinstance(value, bool), "true or false"),
    "actorder": (lambda value: isinstance(value, (bool, str)), "a string, or true or false"),
}


def check_quantization_config(about: Any, where: str) -> dict[str, Any]:
    """`about`, a quantization_config that is not null. where: what has it, in errors.

    ValueError, in one line, for anything but an object, a quant_method that is no string, a key that belongs to another
    method, and a value of another kind under a key that is read. The keys of methods that are not read are not looked
    at."""
    found = _object(about, where)
    method = found.get("quant_method")
    if "quant_method" in found and not isinstance(method, str):
        _refuse(f"{where}.quant_method", method, f"a string, as {FP8!r}")
    if method is not None and method not in _FORMATS:
        return found
    for key, owner in _KEY_OF.items():
        if found.get(key) and method not in (None, owner):
            raise ValueError(
                f"{where}.quant_method is {shown(method)}, and {key} is there; beside {key} it takes {owner!r}"
            )
    if method is None or _FORMATS[method]:
        _check_keys(found, where, _KEYS)
        _check_patterns(found, where)
        _check_groups(found, where)
    return found


def _check_patterns(about: Mapping[str, Any], where: str) -> None:
    for key in _LEFT_OUT:
        for entry in about.get(key) or ():
            try:
                re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
            except re.error as error:
                raise ValueError(
                    f"{where}.{key} has {shown(entry)}; after re: it takes a regular expression ({error})"
                ) from None


def _check_groups(about: Mapping[str, Any], where: str) -> None:
    """config_groups of compressed-tensors; a group whose weights are null quantises activations alone."""
    groups, at = about.get("config_groups"), f"{where}.config_groups"
    if groups is None and not ("config_groups" in about and about.get("quant_method") == COMPRESSED):
        return
    for name, group in _object(groups, at).items():
        here = f"{at}[{shown(name)}]"
        weights = _object(group, here).get("weights")
        if weights is None:
            continue
        here += ".weights"
        _check_keys(_object(weights, here), here, _OF_WEIGHTS)
        if weights.get("strategy") == "group" and weights.get("group_size") == -1:
            _refuse(f"{here}.group_size", -1, "a whole number above 0 with strategy 'group'")


def _check_keys(about: Mapping[str, Any], where: str, rules: _Rules) -> None:
    for key, (is_right, takes) in rules.items():
        value = about.get(key)
        if value is not None and not is_right(value):
            _refuse(f"{where}.{key}", value, takes)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(where, value, "an object")
    found: dict[str, Any] = value
    return found


def _refuse(where: str, value: object, takes: str) -> None:
    got = "null" if value is None else shown(value)
    raise ValueError(f"{where} is {got}; it takes {takes}")


@dataclass(frozen=True)
class QuantizationConfig:
    """`about` is the quantization_config in `file`, empty where there is none."""

    file: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def beside(cls, path: Path) -> QuantizationConfig:
        """That of config.json in a checkpoint's folder, or beside its file; one that is null counts as none.

        ValueError as check_quantization_config."""
        file = (path if path.is_dir() else path.parent) / "config.json"
        document = read_json(file) if file.is_file() else {}
        inner = document.get("text_config")
        said = [
            check_quantization_config(each["quantization_config"], f"{file}: {before}quantization_config")
            for before, each in (("", document), ("text_config.", inner if isinstance(inner, dict) else {}))
            if each.get("quantization_config") is not None
        ]
        return cls(file, *said[:1])

    def require_method(self, where: str, format: str) -> None:
        """ValueError where its quant_method is not one of a matrix in this format. where: the matrix, in the error."""
        method = self.about.get("quant_method")
        if format not in _FORMATS.get(str(method), (format,)):
            raise ValueError(
                f"{where} is {format}; {self.file} says quant_method {shown(method)}, and {format} takes "
                f"{methods_of(format)}"
            )

    def require(self, stem: str, matrix: StoredMatrix) -> None:
        """ValueError, with file and tensor, where it contradicts the matrix `stem`: other bits, integers, another group
        or block, zero points, a list of modules that are not quantised, or another quant_method."""
        has = f"{matrix.where[0]} is {matrix.format}"
        self.require_method(matrix.where[0], matrix.format)
        if entry := self._left_out(stem.removesuffix(f".{WEIGHT}")):
            raise ValueError(f"{has}, and {self.file} says that it is not quantised: {entry}")
        said, groups = list(self._integers()), self.about.get("config_groups")
        if matrix.format not in ("int4", "int8"):
            if said and isinstance(groups, dict) and len(said) == len(groups):
                raise ValueError(f"{has}; {self.file} says {self._shown(said[0])}, of integers")
            for key, read in (("weight_block_size", (list(matrix.block),)), ("fmt", _E4M3)):
                if matrix.format == "fp8" and self.about.get(key) not in (None, *read):
                    raise ValueError(f"{has}, read with {key} {read[0]}; {self.file} says {self.about[key]}")
        else:
            types = [weights.get("type") for weights in self._weights()]
            if types and not said and None not in types:
                raise ValueError(f"{has}; {self.file} says type {shown(types[0])} in config_groups, and it takes 'int'")
            if said and all(weights.get("actorder") in ("group", "dynamic", True) for weights in said):
                raise ValueError(f"{has}, and {self.file} says actorder: columns in another order are not read")
            if said and not any(_agrees(weights, matrix) for weights in said):
                group = f"a scale for {matrix.block[1]} weights" if matrix.block[1] else "a scale for a row"
                points = "without zero points" if matrix.zero_points is None else "with zero points"
                raise ValueError(f"{has} with {group}, {points}; {self.file} says {self._shown(said[0])}")

    @staticmethod
    def _shown(weights: Mapping[str, Any]) -> dict[str, Any]:
        return {key: weights.get(key) for key in ("num_bits", "strategy", "group_size", "symmetric")}

    def _left_out(self, module: str) -> str:
        for key in _LEFT_OUT:
            entries = self.about.get(key)
            for entry in entries if isinstance(entries, list) else []:
                if _names(str(entry), module):
                    return f"{key} has {entry}"
        return ""

    def _integers(self) -> Iterator[Mapping[str, Any]]:
        """`weights` of each group of compressed-tensors, of integers."""
        return (weights for weights in self._weights() if weights.get("type") == "int")

    def _weights(self) -> Iterator[Mapping[str, Any]]:
        groups = self.about.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else []:
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                yield weights


def methods_of(format: str) -> str:
    """The values of quant_method beside matrices in this format, in words."""
    return " or ".join(repr(method) for method, formats in _FORMATS.items() if format in formats)


def _names(entry: str, module: str) -> bool:
    """Whether an entry, a module's name or "re:" and a pattern, is about `module` or a module that it is in."""
    if not entry.startswith("re:"):
        return f"{module}.".startswith(f"{entry}.")
    try:
        return re.match(entry.removeprefix("re:"), module) is not None
    except re.error:
        return False


def _agrees(weights: Mapping[str, Any], matrix: StoredMatrix) -> bool:
    """Whether what is said of integers is true of the matrix; what is not said is."""
    bits, size, symmetric = (weights.get(key) for key in ("num_bits", "group_size", "symmetric"))
    row = matrix.block[1] in (0, matrix.shape[-1])
    of_groups = matrix.block[1] == size if isinstance(size, int) and size > 0 else True
    of_rows = row if weights.get("strategy") == "channel" or size == -1 else True
    points = symmetric is None or symmetric == (matrix.zero_points is None)
    return bits in (None, {"int4": 4, "int8": 8}[matrix.format]) and of_groups and of_rows and points
