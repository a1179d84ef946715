"""Projectors: what the teacher's cache changes in the base's, layer by layer.

Comes in: keys and values [n, heads, head_dim] of both models for n aligned tokens. Goes out: the base's, fused, in its
shape and dtype. With b the base's and t the teacher's, flattened, per layer and for keys and values apart:

    fused = b + sigmoid(Wᵥ [b, t]) ⊙ W₂ silu(W₁ [b, t])        one weight a head; W with biases

This is the projection, fusion and head weighting of the cache-to-cache paper, section 3.3; its gate, which drops whole
layers, is left out. W₂ starts as zero: then fused is b, bit for bit, and a training can start from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ktverify.bench.c2c.record import IDENTITY
from ktverify.system.files import write_whole


@dataclass(frozen=True)
class Heads:
    """heads × head_dim of keys or of values."""

    count: int
    dim: int

    @property
    def width(self) -> int:
        return self.count * self.dim


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps for a token."""

    key: Heads
    value: Heads


class Fuser(nn.Module):
    """Keys or values of one layer: [n, base heads, dim] and [n, teacher heads, dim] to [n, base heads, dim]."""

    def __init__(self, base: Heads, teacher: Heads, hidden: int) -> None:
        super().__init__()
        joint = base.width + teacher.width
        self.inner = nn.Linear(joint, hidden)
        self.outer = nn.Linear(hidden, base.width)
        self.weigh = nn.Linear(joint, base.count)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, base: Tensor, teacher: Tensor) -> Tensor:
        joint = torch.cat([base.flatten(1), teacher.flatten(1)], dim=-1)
        change = self.outer(nn.functional.silu(self.inner(joint))).view_as(base)
        fused: Tensor = base + torch.sigmoid(self.weigh(joint)).unsqueeze(-1) * change
        return fused


class Projector(nn.Module):
    """One layer's keys and values; see Fuser for the shapes."""

    def __init__(self, base: LayerShape, teacher: LayerShape, hidden: int) -> None:
        super().__init__()
        self.key = Fuser(base.key, teacher.key, hidden)
        self.value = Fuser(base.value, teacher.value, hidden)

    def forward(self, base: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.key(base[0], teacher[0]), self.value(base[1], teacher[1])


def layer_pairs(base: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """(base's layer, teacher's layer), the last with the last and so on down: as many as the shallower model has."""
    both = min(base, teacher)
    return tuple((base - both + i, teacher - both + i) for i in range(both))


class Projectors(nn.ModuleList):
    """A projector for each pair of layers; `pairs` says which. `name`: identity, or the file they come from."""

    def __init__(
        self, base: Sequence[LayerShape], teacher: Sequence[LayerShape], hidden: int | None = None, name: str = IDENTITY
    ) -> None:
        """The identity on the base. hidden: width between W₁ and W₂, the base's keys' by default."""
        pairs = layer_pairs(len(base), len(teacher))
        super().__init__(Projector(base[to], teacher[source], hidden or base[to].key.width) for to, source in pairs)
        self.pairs, self.name = pairs, name

    def save(self, path: Path) -> None:
        """Write them to a safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(path, save(tensors, metadata={"layer_pairs": _text(self.pairs)}))

    @classmethod
    def load(cls, path: Path, base: Sequence[LayerShape], teacher: Sequence[LayerShape]) -> Projectors:
        """Those of a file that `save` wrote. ValueError for a file of other models, or none at all."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                pairs = (file.metadata() or {}).get("layer_pairs", "")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--projectors {path} cannot be read: {error}") from None
        inner = tensors.get("0.key.inner.weight")
        if inner is None:
            raise ValueError(
                f"--projectors {path} has no 0.key.inner.weight; it takes a file that Projectors.save wrote"
            )
        found = cls(base, teacher, inner.shape[0], str(path))
        if pairs != _text(found.pairs):
            raise ValueError(
                f"--projectors {path} pairs the layers {pairs or 'nothing'}, these models {_text(found.pairs)}"
            )
        _check(path, tensors, found.state_dict())
        found.load_state_dict(tensors)
        return found


def _check(path: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in sorted({*tensors, *wanted}):
        has = f"a {name} of {list(tensors[name].shape)}" if name in tensors else f"no {name}"
        takes = f"one of {list(wanted[name].shape)}" if name in wanted else "none"
        if name not in tensors or name not in wanted or tensors[name].shape != wanted[name].shape:
            raise ValueError(f"--projectors {path} has {has}, these models take {takes}")


def _text(pairs: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{mine}:{theirs}" for mine, theirs in pairs)
