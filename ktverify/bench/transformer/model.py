"""A decoder-only transformer in plain torch: RMSNorm before, RoPE, causal attention, SwiGLU, untied head, no biases.

The forward returns the mean cross-entropy. The model is written so that autograd saves exactly the tensors which
memory.py counts: no operation in place, no dropout, the input of each product saved once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ktverify.bench.transformer.sizes import ModelSize

_EPS = 1e-5


class RMSNorm(nn.Module):
    """x [..., d] -> weight ⊙ x / sqrt(mean(x²) + eps), in fp32 and rounded once to x's dtype.

    Zhang, Sennrich: Root Mean Square Layer Normalization, 2019."""

    def __init__(self, d_model: int, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model, **where))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
        return self.weight * (wide * inverse).to(x.dtype)


class Rope(nn.Module):
    """x [batch, heads, context, head] -> the same, pairs (i, i + head/2) turned by position · theta^(-2i/head).

    Su et al.: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, head: int, context: int, theta: float, device: str) -> None:
        super().__init__()
        rates = theta ** (-torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)
        angles = torch.arange(context, dtype=torch.float32, device=device)[:, None] * rates
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cosine, sine = self.cosine[: x.shape[-2]], self.sine[: x.shape[-2]]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
        return turned.to(x.dtype)


class Attention(nn.Module):
    """x [batch, context, d] -> [batch, context, d]; every position sees itself and those before it."""

    later: Tensor

    def __init__(self, size: ModelSize, rope: Rope, **where: Any) -> None:
        super().__init__()
        d = size.d_model
        self.heads, self.fused, self.rope = size.num_heads, size.attention == "fused", rope
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False, **where) for _ in range(4))
        later = torch.ones(size.context_length, size.context_length, dtype=torch.bool, device=rope.cosine.device)
        self.register_buffer("later", later.triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, d = x.shape
        q, k, v = (part(x).view(batch, context, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = self.rope(q), self.rope(k)
        if self.fused:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            hidden = scores.masked_fill(self.later[:context, :context], float("-inf"))
            found = hidden.softmax(dim=-1) @ v
        result: Tensor = self.out(found.transpose(1, 2).reshape(batch, context, d))
        return result


class SwiGLU(nn.Module):
    """x [..., d] -> down(silu(gate x) ⊙ up x), d_ff wide inside. Shazeer: GLU Variants Improve Transformer, 2020."""

    def __init__(self, size: ModelSize, **where: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(size.d_model, size.d_ff, bias=False, **where)
        self.up = nn.Linear(size.d_model, size.d_ff, bias=False, **where)
        self.down = nn.Linear(size.d_ff, size.d_model, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class TransformerLayer(nn.Module):
    def __init__(self, size: ModelSize, rope: Rope, **where: Any) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(size.d_model, **where), Attention(size, rope, **where)
        self.feed_forward_norm, self.feed_forward = RMSNorm(size.d_model, **where), SwiGLU(size, **where)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        result: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return result


class Transformer(nn.Module):
    """tokens, targets int64 [batch, context] -> mean cross-entropy, fp32 scalar. device "meta" allocates nothing."""

    def __init__(self, size: ModelSize, device: str = "cpu") -> None:
        super().__init__()
        where = {"device": device, "dtype": getattr(torch, size.dtype)}
        self.size = size
        self.embedding = nn.Embedding(size.vocab_size, size.d_model, **where)
        rope = Rope(size.d_model // size.num_heads, size.context_length, size.rope_theta, device)
        self.layers = nn.ModuleList(TransformerLayer(size, rope, **where) for _ in range(size.num_layers))
        self.norm = RMSNorm(size.d_model, **where)
        self.head = nn.Linear(size.d_model, size.vocab_size, bias=False, **where)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens int64 [batch, context] -> [batch, context, vocab_size] in the model's dtype."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x))
        return result

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).float().flatten(0, 1), targets.flatten())


def batch_of(size: ModelSize, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, int64 [batch, context]; the same on every device for one seed."""
    if device == "meta":
        empty = torch.empty((size.batch_size, size.context_length), dtype=torch.int64, device="meta")
        return empty, torch.empty_like(empty)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size.vocab_size, (size.batch_size, size.context_length + 1), generator=generator)
    return drawn[:, :-1].contiguous().to(device), drawn[:, 1:].contiguous().to(device)
