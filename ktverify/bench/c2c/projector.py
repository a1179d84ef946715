"""Projectors fuse the teacher's cache into the base's, layer by layer.

Input: keys and values [n, heads, head_dim] of both models for n aligned tokens. Output: the base's keys and values,
fused, in its shape and dtype. For each layer, separately for keys and values, with b the base's and t the teacher's,
flattened:

    fused = b + sigmoid(Wᵥ [b, t]) ⊙ W₂ silu(W₁ [b, t])        one weight a head; W with biases

This is the projection, fusion and head weighting of the cache-to-cache paper, section 3.3, without its gate, which
leaves out whole layers. W₂ is initialised with zeros: then fused is b, bit for bit, and a training can start from it.
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
    """What a layer caches for a token."""

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
    """(base's layer, teacher's layer), paired from the last layers down, for all layers of the shallower model."""
    both = min(base, teacher)
    return tuple((base - both + i, teacher - both + i) for i in range(both))


class Projectors(nn.ModuleList):
    """A projector for each pair of layers. pairs: the pairs; name: identity, or the file of the projectors."""

    def __init__(
        self, base: Sequence[LayerShape], teacher: Sequence[LayerShape], hidden: int | None = None, name: str = IDENTITY
    ) -> None:
        """Initialise as the identity on the base. hidden: width between W₁ and W₂, by default as the base's keys."""
        pairs = layer_pairs(len(base), len(teacher))
        super().__init__(Projector(base[to], teacher[source], hidden or base[to].key.width) for to, source in pairs)
        self.pairs, self.name = pairs, name

    def save(self, path: Path) -> None:
        """Write the projectors to a safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(path, save(tensors, metadata={"layer_pairs": _text(self.pairs)}))

    @classmethod
    def load(cls, path: Path, base: Sequence[LayerShape], teacher: Sequence[LayerShape]) -> Projectors:
        """Load the projectors of a file that `save` wrote. ValueError for a missing file or one of other models."""
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
