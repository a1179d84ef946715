"""Sizes of a decoder-only transformer, from presets.toml and options; parameters and operations. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ktverify.spec.cases import read_toml

TABLE = Path(__file__).with_name("presets.toml")
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}
# plain writes the scores [batch, heads, context, context] out; fused is torch's scaled_dot_product_attention
ATTENTIONS = ("plain", "fused")

EMBEDDING, ATTENTION, FEED_FORWARD, NORMS, HEAD, LOSS = (
    "token embedding",
    "attention",
    "feed-forward",
    "norms",
    "output head",
    "loss",
)
PARTS = (EMBEDDING, ATTENTION, FEED_FORWARD, NORMS, HEAD, LOSS)


@dataclass(frozen=True)
class ModelSize:
    """One model and one batch. context_length, batch_size: tokens a sequence, sequences; dtype: of parameters and
    activations. Norms, rotations, and the loss are computed in fp32 whatever the dtype."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = 10_000
    context_length: int = 256
    batch_size: int = 4
    dtype: str = "float32"
    attention: str = "plain"
    rope_theta: float = 10_000.0
    name: str = "custom"

    def __post_init__(self) -> None:
        counts = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size", "context_length", "batch_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it takes a whole number from 1 on")
        if self.d_model % self.num_heads or (self.d_model // self.num_heads) % 2:
            raise ValueError(
                f"d_model is {self.d_model}, it takes a multiple of 2 num_heads = {2 * self.num_heads}: "
                "RoPE turns pairs within a head"
            )
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta is {self.rope_theta:g}, it takes a number above 0")
        for name, allowed in (("dtype", tuple(DTYPE_BYTES)), ("attention", ATTENTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, it takes {' or '.join(allowed)}")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context_length

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def text(self) -> str:
        return (
            f"{self.name}: d_model {self.d_model}, d_ff {self.d_ff}, {self.num_layers} layers, {self.num_heads} heads, "
            f"vocabulary {self.vocab_size}; batch {self.batch_size}, context {self.context_length}, {self.dtype}, "
            f"{self.attention} attention"
        )


def presets() -> dict[str, ModelSize]:
    """All rows of presets.toml by name, in the file's order."""
    return {name: ModelSize(name=name, **row) for name, row in read_toml(TABLE).items()}


def resolve(preset: str, changes: dict[str, Any]) -> ModelSize:
    """The preset with `changes` (None: unchanged). ValueError for an unknown preset or a wrong size.

    A model whose own sizes were changed has the preset's name with a `*`.
    """
    known = presets()
    if preset not in known:
        raise ValueError(f"no preset is called {preset!r}; there are {', '.join(known)}")
    base = known[preset]
    given = {name: value for name, value in changes.items() if value is not None}
    own = ("d_model", "d_ff", "num_layers", "num_heads")
    changed = any(name in given and given[name] != getattr(base, name) for name in own)
    return replace(base, **given, name=f"{preset}*" if changed else preset)


def parameters(size: ModelSize) -> dict[str, int]:
    """Parameters by part. Embedding and output head are two matrices [vocab_size, d_model]; no biases.

    A layer: q, k, v and output projections [d, d]; gate, up [d_ff, d] and down [d, d_ff]; two norms [d]; one more norm
    after the last layer.
    """
    d, layers = size.d_model, size.num_layers
    return {
        EMBEDDING: size.vocab_size * d,
        ATTENTION: layers * 4 * d * d,
        FEED_FORWARD: layers * 3 * d * size.d_ff,
        NORMS: (2 * layers + 1) * d,
        HEAD: size.vocab_size * d,
        LOSS: 0,
    }


def forward_flops(size: ModelSize) -> float:
    """Operations of the forward's matrix products (a multiplication and an addition are two); backward has twice as
    many. Attention's two products count in full, although the causal mask discards half of them."""
    products = parameters(size)
    weights = products[ATTENTION] + products[FEED_FORWARD] + products[HEAD]
    return 2.0 * size.tokens * weights + 4.0 * size.num_layers * size.tokens * size.context_length * size.d_model
