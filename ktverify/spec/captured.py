"""Captured calls: the routing, sizes and spread of one forward and backward of a real training, as a small file.

A file contains expert_ids and weights as the router gave them, and in its metadata the sizes, the layer, the number of
the call, and the standard deviations of hidden_states and grad_output. Tokens and weights of the model are not in it,
unless the tensors were asked for: then hidden_states and grad_output are.

`inputs_of` makes inputs of it. Base weights, LoRA and, where the file lacks them, the tokens come from the generator.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.system.files import write_whole

FORMAT = "1"
TOKENS = ("hidden_states", "grad_output")
# what a call of a training takes at the most; a file that says more is no captured call
_LARGEST = 1 << 24


@dataclass(frozen=True)
class Captured:
    """One call of a layer. case: its sizes, with a seed for what is not in the file. layer, call: its layer's index,
    and how many calls of the layer were before it. expert_ids int64 [T, k], -1 for an empty slot; weights fp32 [T, k].
    spread: standard deviations of hidden_states and, after a backward, of grad_output; no unit. tensors: these two,
    bf16 [T, H], where they were asked for."""

    case: Case
    layer: int
    call: int
    expert_ids: torch.Tensor
    weights: torch.Tensor
    spread: Mapping[str, float]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        return f"layer{self.layer:03d}_call{self.call:06d}.safetensors"


def spread_of(tensor: torch.Tensor) -> float:
    """The standard deviation of a tensor about 0; 0.0 for one without elements."""
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0


def write(captured: Captured, directory: str | os.PathLike[str]) -> Path:
    """Write the file of a call into `directory`, whole or not at all. Returns its path."""
    from safetensors.torch import save

    tensors = {"expert_ids": captured.expert_ids.to(torch.int32), "weights": captured.weights, **captured.tensors}
    about = {"ktverify_captured": FORMAT, "case": captured.case.id}
    about |= {"layer": str(captured.layer), "call": str(captured.call)}
    about |= {name: repr(value) for name, value in captured.spread.items()}
    path = Path(directory) / captured.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, about))
    return path


def read(path: str | os.PathLike[str]) -> Captured:
    """Read the file of a call. FileNotFoundError; ValueError that names the file and what is wrong in it."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no captured call at {path}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("ktverify_captured") != FORMAT:
                raise ValueError(f"it is no captured call of format {FORMAT}")
            return _checked(about, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}") from None


def _checked(about: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Captured:
    case = Case.parse(about["case"])
    if max(case.num_experts, case.hidden, case.intermediate, case.qlen, case.rank) > _LARGEST:
        raise ValueError(f"its sizes are those of no layer: {case.id}")
    slots, rows = (case.qlen, case.top_k), (case.qlen, case.hidden)
    forms = {"expert_ids": (torch.int32, slots), "weights": (torch.float32, slots)}
    forms |= {name: (torch.bfloat16, rows) for name in TOKENS if name in tensors}
    for name, (dtype, shape) in forms.items():
        found = tensors[name]
        if (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)}; it takes {dtype} {list(shape)}")
    ids, weights = tensors["expert_ids"].long(), tensors["weights"]
    if case.qlen and not (int(ids.min()) >= -1 and int(ids.max()) < case.num_experts):
        raise ValueError(f"expert_ids go from {int(ids.min())} to {int(ids.max())}; it takes -1 to E - 1")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("weights are not finite")
    spread = {name: float(about[name]) for name in TOKENS if name in about}
    kept = {name: tensors[name] for name in TOKENS if name in tensors}
    return Captured(case, int(about["layer"]), int(about["call"]), ids, weights, spread, kept)


def inputs_of(captured: Captured) -> Inputs:
    """The inputs of a captured call: its routing; its tokens, or the generator's times the power of two that is nearest
    to the captured standard deviation. MemoryError, before anything is made, where they do not fit."""
    inputs = make_inputs(captured.case, expert_ids=captured.expert_ids.numpy())
    inputs.weights = captured.weights
    for name in TOKENS:
        value = captured.spread.get(name, 1.0)
        scale = 2.0 ** round(math.log2(value)) if 0 < value < math.inf else 1.0
        setattr(inputs, name, captured.tensors.get(name, getattr(inputs, name) * scale))
    return inputs
