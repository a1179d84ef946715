"""The base weights of one layer in a checkpoint: bf16 or codes, as views of mapped files."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from ktverify.engines.argument_checks import FORMATS, LayerSpec
from ktverify.engines.checkpoint_files import Checkpoint
from ktverify.engines.native.base_weights import Sources, sources_of_codes
from ktverify.engines.quantise import INT4_GROUPS, MADE
from ktverify.engines.quantised import check_cut, check_values, made_codes, weight_format_of
from ktverify.engines.quantization_config import QuantizationConfig
from ktverify.engines.weight_files import LAYOUTS, StoredMatrix, matrix_of, name_of, require_one_form, stored_matrix
from ktverify.spec.names import BASE_NAMES

# names of an expert's matrices in model families, after any prefix and before ".weight"
FAMILIES: dict[str, dict[str, str]] = {
    "DeepSeek, Qwen, GLM, OLMoE": {name: f"layers.{{layer}}.mlp.experts.{{expert}}.{name}" for name in BASE_NAMES},
    "Mixtral": {
        name: f"layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{short}"
        for name, short in zip(BASE_NAMES, ("w1", "w3", "w2"), strict=True)
    },
}
_CODES = "|".join(sorted({layout.codes for layout in LAYOUTS.values()}))

# layers of files whose values were looked at, so that a layer that is built again does not read them again
_CHECKED: set[tuple[object, ...]] = set()


class ExpertFiles:
    """The experts of layer spec.layer_idx in the checkpoint at spec.weight_path, checked: gate_proj, up_proj [I, H],
    down_proj [H, I] of each expert by BASE_NAMES, as views of mapped files; with scales and zero points for codes.

    first, total: these are the experts from `first` on of the layer's `total`, by default all. The others are not read.

    A checkpoint may have several towers of layers. Those of OTHER_TOWERS are never taken; of the others, one alone may
    have routed experts, and a layer that predicts further tokens is none of the decoder's.

    In one line that names file and tensor: ValueError for two towers or files that have the experts, a missing path or
    tensor, another format or shape, more experts, groups that the engine has not, codes and scales that are no numbers;
    TypeError for another dtype. RuntimeError where a tensor-parallel part would begin inside a group.
    """

    def __init__(self, spec: LayerSpec, first: int = 0, total: int | None = None) -> None:
        self.checkpoint = Checkpoint(spec.weight_path)
        self._spec = spec
        self._experts = range(first, first + spec.num_experts)
        total = spec.num_experts if total is None else total
        tower, family = _decoder(self.checkpoint.files_of, self.checkpoint.where, spec.layer_idx)
        self._names = {name: tower + pattern for name, pattern in FAMILIES[family].items()}
        one_more = self._stem(BASE_NAMES[0], total)
        if any(name_of(one_more, layout.codes) in self.checkpoint for layout in LAYOUTS.values()):
            layer = f"{self.checkpoint.where}, layer {spec.layer_idx},"
            raise ValueError(f"{layer} has more experts than num_experts ({total})")
        self._config = QuantizationConfig.beside(self.checkpoint.path)
        self._format = self._found_format()
        self.weights: dict[str, list[torch.Tensor]] = {name: [] for name in BASE_NAMES}
        self.scales: dict[str, list[torch.Tensor]] = {name: [] for name in BASE_NAMES}
        self.zero_points: dict[str, list[torch.Tensor]] = {name: [] for name in BASE_NAMES}
        self.group = 0
        self._read()

    def sources(self, slots: list[int]) -> Sources:
        """slots: the logical expert of each of the checkpoint's experts. Codes of bf16 weights are made here."""
        if self._format != self._spec.weight_format:
            return sources_of_codes(made_codes(self._spec, self.weights), slots)
        files = list(self.checkpoint.mapped.values())
        if self._format == "bf16":
            return Sources(list(self.weights.values()), slots, files=files)
        name = BASE_NAMES[0]
        zeros = self.zero_points[name][0] if self.zero_points[name] else None
        return Sources(
            list(self.weights.values()),
            slots,
            files=files,
            format=weight_format_of(self._format, self.group, self.weights[name][0], self.scales[name][0], zeros),
            scales=list(self.scales.values()),
            zeros=None if zeros is None else list(self.zero_points.values()),
        )

    def _stem(self, name: str, expert: int) -> str:
        return f"{self._names[name]}.weight".format(layer=self._spec.layer_idx, expert=expert)

    def _found_format(self) -> str:
        """The first expert's format: the method's, or bf16 where the method makes codes. ValueError for another."""
        stem = self._stem(BASE_NAMES[0], 0)
        for word in _CODES.split("|"):
            if found := self.checkpoint.lookup(name_of(stem, word)):
                (file, tensor), wanted = found, self._spec.weight_format
                known = matrix_of(self.checkpoint.lookup, name_of(stem, word))
                format = known[1] if known else "bf16"
                if format == "bf16" and wanted in MADE:
                    return format
                if format != wanted and (known or tensor.get_dtype() == "BF16"):
                    method = next(name for name, each in FORMATS.items() if each == format)
                    raise ValueError(
                        f"{file}: {name_of(stem, word)} is {format} ({tensor.get_dtype()}), method {self._spec.method} "
                        f"takes {wanted}; method {method} reads it"
                    )
        return self._spec.weight_format

    def _read(self) -> None:
        spec = self._spec
        for expert in self._experts:
            for name, shape in spec.expert_shapes.items():
                stem = self._stem(name, expert)
                if self._format == "bf16":
                    self.weights[name].append(_plain(self.checkpoint, stem, shape, spec))
                    continue
                matrix = stored_matrix(self.checkpoint.lookup, stem, spec.weight_format, self.checkpoint.where)
                self._config.require(stem, matrix)
                self._check(matrix, shape)
                self._keep(name, matrix)
        made = self._format != spec.weight_format
        check_cut(spec, MADE[spec.weight_format] if made else self.group)
        if self._format != "bf16":
            self._check_values()

    def _check_values(self) -> None:
        """Read all codes and scales once, unless these files were read before; each expert's pages are given back."""
        spec = self._spec
        files = sorted(file.identity() for file in self.checkpoint.mapped.values())
        key = (spec.layer_idx, spec.weight_format, self._experts, *files)
        if key in _CHECKED:
            return
        for expert in self._experts:
            mapped = self.checkpoint.again()
            for name in BASE_NAMES:
                matrix = stored_matrix(mapped.lookup, self._stem(name, expert), spec.weight_format, mapped.where)
                check_values(matrix.format, matrix.where, *matrix.values())
        _CHECKED.add(key)

    def _check(self, matrix: StoredMatrix, shape: tuple[int, int]) -> None:
        if matrix.shape != shape:
            raise ValueError(f"{matrix.where[0]} is a matrix of {list(matrix.shape)}; the layer takes {list(shape)}")
        group = matrix.block[1]
        if matrix.format == "int4" and group not in INT4_GROUPS:
            takes = " or ".join(map(str, INT4_GROUPS))
            raise ValueError(f"{matrix.where[1]} has a scale for {group} weights; the layer takes one for {takes}")
        if matrix.format == "int8" and matrix.codes.get_dtype() == "I32" and shape[1] % 4:
            raise ValueError(f"{matrix.where[0]} has rows of {shape[1]} weights; the layer takes multiples of 4")
        if self.group and group != self.group:
            raise ValueError(
                f"{matrix.where[1]} has a scale for {group} weights, matrices before have one for {self.group}"
            )
        self.group = group

    def _keep(self, name: str, matrix: StoredMatrix) -> None:
        codes, scales, zeros = matrix.values()
        if zeros is not None and self.weights[BASE_NAMES[0]] and not self.zero_points[BASE_NAMES[0]]:
            raise ValueError(f"{matrix.where[2]} is there, and matrices before have no zero points")
        if zeros is None and self.zero_points[BASE_NAMES[0]]:
            raise ValueError(f"{matrix.where[0]} has no {matrix.where[2]}, and matrices before have zero points")
        scales = _as_engine_takes(matrix, scales)
        for tensor, of, where in ((codes, self.weights, matrix.where[0]), (scales, self.scales, matrix.where[1])):
            if (before := of[BASE_NAMES[0]]) and tensor.dtype != before[0].dtype:
                got, wanted = (str(each.dtype).removeprefix("torch.") for each in (tensor, before[0]))
                raise TypeError(f"{where} is {got}, matrices before have {wanted}")
            of[name].append(tensor)
        if zeros is not None:
            self.zero_points[name].append(zeros)


def sources_in_files(spec: LayerSpec, slots: list[int], first: int = 0, total: int | None = None) -> Sources:
    """The Sources of layer spec.layer_idx in the checkpoint at spec.weight_path. Arguments and errors: ExpertFiles."""
    return ExpertFiles(spec, first, total).sources(slots)


def _as_engine_takes(matrix: StoredMatrix, scales: torch.Tensor) -> torch.Tensor:
    """Scales as the contract has them, with the same values: fp32, of int4 as they are, of mxfp4 bytes."""
    if matrix.format == "mxfp4":
        return scales.view(torch.uint8)
    return scales if matrix.format == "int4" else scales.float()


def _plain(checkpoint: Checkpoint, name: str, shape: tuple[int, int], spec: LayerSpec) -> torch.Tensor:
    """A bf16 matrix as a view of its file."""
    require_one_form(checkpoint.lookup, name)
    found = checkpoint.lookup(name)
    if found is None:
        raise ValueError(f"{checkpoint.where} has no {name}")
    file, tensor = found
    if tensor.get_dtype() != "BF16":
        codes = LAYOUTS[spec.weight_format]
        also = f", or {codes.codes} of {' or '.join(codes.code_dtypes)}" if spec.weight_format != "bf16" else ""
        raise TypeError(f"{file}: {name} is {tensor.get_dtype()}; method {spec.method} takes BF16{also}")
    if tuple(tensor.get_shape()) != shape:
        raise ValueError(f"{file}: {name} has shape {tensor.get_shape()}; the layer takes {list(shape)}")
    return checkpoint.tensor(name)


# parts of the names of towers that are not the decoder, as mtp in mtp.layers.0 and talker in talker.model.layers.0
OTHER_TOWERS = re.compile(
    r"(^|[._])(mtp|nextn|vision|visual|vit|image|audio|speech|talker|code2wav|code_predictor|encoder|draft|eagle|medusa)"
)
# tensors that only a layer has which predicts further tokens
FURTHER_TOKENS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")


def _decoder(tensors: Iterable[str], where: str, layer: int) -> tuple[str, str]:
    """What stands before "layers.N." in the names of the decoder, and its family. ValueError where it is not one."""
    patterns = {}
    for family, names in FAMILIES.items():
        numbered = re.escape(names[BASE_NAMES[0]]).replace(r"\{layer\}", r"(0|[1-9]\d*)")
        numbered = numbered.replace(r"\{expert\}", r"\d+")
        patterns[family] = re.compile(rf"((?:.*\.)?){numbered}\.({_CODES})")
    towers: dict[str, dict[int, dict[str, str]]] = {}  # prefix -> layer -> family -> the first expert's name
    for name in tensors:
        for family, pattern in patterns.items():
            if found := pattern.fullmatch(name):
                towers.setdefault(found[1], {}).setdefault(int(found[2]), {}).setdefault(family, name)
    chosen = {prefix: layers for prefix, layers in towers.items() if not OTHER_TOWERS.search(prefix)}
    prefix, layers = next(iter(chosen.items()), ("", {}))
    rivals = [next(iter(found[min(found)].values())) for found in chosen.values()]
    if len(rivals) < 2:
        rivals = list(layers.get(layer, {}).values())
    if len(rivals) > 1:
        raise ValueError(f"{where} has routed experts twice, either may be the decoder's: {rivals[0]}, {rivals[1]}")
    if layer not in layers:
        wanted = " or ".join(
            f"{names[BASE_NAMES[0]]}.weight".format(layer=layer, expert=0) for names in FAMILIES.values()
        )
        others = [name for found in towers.values() for name in found.get(layer, {}).values()]
        also = f"; {others[0]} is not the decoder's" if others else _why_none(tensors)
        raise ValueError(f"{where} holds no routed experts of layer {layer}: no {wanted}{also}")
    only_theirs = tuple(f"{prefix}layers.{layer}.{part}" for part in FURTHER_TOKENS)
    further = next((name for name in tensors if name.startswith(only_theirs)), "")
    if further:
        raise ValueError(
            f"{where}: layer {layer} predicts further tokens ({further}), it is none of the decoder's; "
            f"those with routed experts are {min(layers)} to {layer - 1}"
        )
    return prefix, next(iter(layers[layer]))


def _why_none(names: Iterable[str]) -> str:
    """What experts of a form that is not read say to a reader, as an addition to an error."""
    for name in names:
        if name.endswith("_proj_blocks"):
            return (
                f"; {name} is of gpt-oss's form, whose experts have biases and a clamped gate: this layer has neither"
            )
        if ".experts." in name and name.endswith(".qweight"):
            return f"; {name} is of GPTQ's or AWQ's form: convert it to compressed-tensors' pack-quantized"
        if name.startswith("blk.") and ".numa." in name:
            return f"; {name} is packed for kt-kernel alone: name the checkpoint that it was made of"
    return ""
