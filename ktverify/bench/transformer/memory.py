"""The memory of one training step of a transformer, part by part: parameters, gradients, AdamW state, saved tensors.

Arithmetic only: imports no torch and allocates nothing. saved_tensors.py measures the saved tensors of the real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktverify.bench.transformer.sizes import (
    ATTENTION,
    EMBEDDING,
    FEED_FORWARD,
    HEAD,
    LOSS,
    NORMS,
    PARTS,
    ModelSize,
    parameters,
)

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class PartMemory:
    """One part of the model, all layers together: elements, and bytes of each kind of memory."""

    part: str
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activations: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True)
class StepMemory:
    """A training step with AdamW, whose two moments have their parameter's dtype (torch.optim.AdamW).

    Not counted: working memory of single operations, and memory that the allocator caches.
    """

    parts: tuple[PartMemory, ...]

    @property
    def all(self) -> PartMemory:
        counts = [name for name in PartMemory.__annotations__ if name != "part"]
        return PartMemory("all", **{name: sum(getattr(part, name) for part in self.parts) for name in counts})


def saved_tensors(size: ModelSize) -> dict[str, list[tuple[int, int]]]:
    """The tensors that autograd saves for backward, by part: (elements, bytes of one), each storage once.

    Of a token and a layer, d = d_model, f = d_ff, h = num_heads, T = context_length:
        each norm       its input in fp32, d; 1 / rms in fp32, 1; the normalised row, d
        attention       the input of q, k, v, d; q, k, v, 3 d; the input of the output projection, d;
                        plain: the probabilities, h T; fused: their logsumexp in fp32, h, and the result once more in
                        the order of the heads, d (torch on the CPU; a kernel that writes it by token avoids that)
        feed-forward    the input of gate and up, d; gate, silu(gate), up, their product, 4 f
    and after the layers: one norm, the head's input, d, the loss's log-probabilities in fp32, vocab_size, and one
    scalar, the targets' weight.
    Parameters and the tables of RoPE are kept in any case and count elsewhere.
    """
    tokens, layers, d, own = size.tokens, size.num_layers, size.d_model, size.element_bytes
    norms = 2 * layers + 1
    rows = layers * tokens
    attention = [(rows * 5 * d, own), (rows * size.num_heads * size.context_length, own)]
    if size.attention == "fused":
        attention = [(rows * 6 * d, own), (rows * size.num_heads, FP32)]
    return {
        EMBEDDING: [(tokens, INT64)],
        ATTENTION: attention,
        FEED_FORWARD: [(rows * (d + 4 * size.d_ff), own)],
        NORMS: [(norms * tokens * (d + 1), FP32), (norms * tokens * d, own)],
        HEAD: [(tokens * d, own)],
        LOSS: [(tokens * size.vocab_size, FP32), (tokens, INT64), (1, FP32)],
    }


def step_memory(size: ModelSize) -> StepMemory:
    """The memory of a training step at the end of its forward."""
    counts, activations = parameters(size), saved_tensors(size)
    found = []
    for part in PARTS:
        own = counts[part] * size.element_bytes
        elements = sum(count for count, _ in activations[part])
        in_bytes = sum(count * each for count, each in activations[part])
        found.append(PartMemory(part, counts[part], own, own, 2 * own, elements, in_bytes))
    return StepMemory(tuple(found))


def one_layer_live(size: ModelSize) -> int:
    """Elements of activations when a single layer is alive at a time, as with full recomputation:

        tokens · (4 d_model + d_ff + num_heads · context_length + vocab_size)

    One layer's q, k, v and result, its d_ff hidden units once, its scores once; and the logits. A published table has
    this total, 39,600,128, for 2.7b at context 256, batch 4. There d_ff = 4 d_model, so the total alone does not
    distinguish 4 d_model + d_ff from 8 d_model; this formula is our reading. A step with full recomputation also keeps
    the input of every layer, num_layers · tokens · d_model, which the table leaves out.
    """
    scores = size.num_heads * size.context_length
    return size.tokens * (4 * size.d_model + size.d_ff + scores + size.vocab_size)


def timing_bytes(size: ModelSize, *, forward_only: bool) -> int:
    """A lower bound of the memory of a step without optimizer: parameters; gradients and saved tensors unless
    forward_only; and twice the largest working memory, logits or one layer."""
    whole = step_memory(size).all
    layer = size.tokens * max(size.vocab_size, 4 * size.d_ff, size.num_heads * size.context_length)
    working = 2 * FP32 * layer
    if forward_only:
        return whole.parameter_bytes + working
    return whole.parameter_bytes + whole.gradient_bytes + whole.activation_bytes + working
