"""What a checkpoint's config.json says of its quantised weights, and whether a stored matrix agrees with it.

transformers' quantization_config of FP8 and the config_groups of compressed-tensors are read. Where config.json says
nothing of a matrix, the files decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktverify.engines.weight_files import WEIGHT, StoredMatrix
from ktverify.system.text import read_json

# lists of modules that are not quantised: compressed-tensors', transformers'
_LEFT_OUT = ("ignore", "modules_to_not_convert")


@dataclass(frozen=True)
class QuantizationConfig:
    """`about` is the quantization_config in `file`, empty where there is none."""

    file: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def beside(cls, path: Path) -> QuantizationConfig:
        """That of config.json in a checkpoint's folder, or beside its file."""
        file = (path if path.is_dir() else path.parent) / "config.json"
        document = read_json(file) if file.is_file() else {}
        inner = document.get("text_config")
        for each in (document, inner if isinstance(inner, dict) else {}):
            if isinstance(about := each.get("quantization_config"), dict):
                return cls(file, about)
        return cls(file)

    def require(self, stem: str, matrix: StoredMatrix) -> None:
        """ValueError, with file and tensor, where it contradicts the matrix `stem`: other bits, integers, another group
        or block, zero points, or a list of modules that are not quantised."""
        has = f"{matrix.where[0]} is {matrix.format}"
        if entry := self._left_out(stem.removesuffix(f".{WEIGHT}")):
            raise ValueError(f"{has}, and {self.file} says that it is not quantised: {entry}")
        said, groups = list(self._integers()), self.about.get("config_groups")
        if matrix.format not in ("int4", "int8"):
            if said and isinstance(groups, dict) and len(said) == len(groups):
                raise ValueError(f"{has}; {self.file} says {self._shown(said[0])}, of integers")
            for key, read in (("weight_block_size", list(matrix.block)), ("fmt", "e4m3")):
                if matrix.format == "fp8" and self.about.get(key) not in (None, read):
                    raise ValueError(f"{has}, read with {key} {read}; {self.file} says {self.about[key]}")
        else:
            if said and all(weights.get("actorder") in ("group", "dynamic") for weights in said):
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
        groups = self.about.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else []:
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict) and weights.get("type") == "int":
                yield weights


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
    of_rows = row if weights.get("strategy") == "channel" else True
    points = symmetric is None or symmetric == (matrix.zero_points is None)
    return bits in (None, {"int4": 4, "int8": 8}[matrix.format]) and of_groups and of_rows and points
