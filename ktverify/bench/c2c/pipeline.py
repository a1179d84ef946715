"""The pipeline: both models read the prompt, the projectors fuse their caches, the base decodes.

The base prefills all tokens but the last. The last one is the input of the first step of decoding, so that even the
first new token is chosen with the fused cache. Decoding is greedy. Rows of the cache that align with no token of the
teacher are not changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ktverify.bench.c2c.alignment import Aligned, align_prompt
from ktverify.bench.c2c.models import Side
from ktverify.bench.c2c.projector import Projectors
from ktverify.system.timing import Timeline


@dataclass(frozen=True)
class Response:
    """Decoded text without special tokens, and all generated tokens, including the one that ends the response."""

    text: str
    tokens: tuple[int, ...]


class Pipeline:
    """A base, a teacher and the projectors between them, on one device. template: use chat templates."""

    def __init__(self, base: Side, teacher: Side, projectors: Projectors, *, template: bool = True) -> None:
        weight = next(base.model.parameters())
        self.base, self.teacher, self.template = base, teacher, template
        self.projectors = projectors.to(device=weight.device, dtype=weight.dtype).eval()

    @torch.inference_mode()
    def run(self, prompt: str, max_new_tokens: int, timeline: Timeline) -> Response:
        """The response to `prompt`; every stage is timed in `timeline`. ValueError as in align_prompt."""
        aligned = align_prompt(prompt, self.base.tokenizer, self.teacher.tokenizer, template=self.template)
        cache = self.fused_cache(aligned, timeline)
        tokens = self._decode(aligned.base.ids[-1], cache, max_new_tokens, timeline)
        text: str = self.base.tokenizer.decode(tokens, skip_special_tokens=True)
        return Response(text, tuple(tokens))

    @torch.inference_mode()
    def fused_cache(self, aligned: Aligned, timeline: Timeline) -> DynamicCache:
        """The base's cache of all tokens but the last, as the projectors change it."""
        mine, theirs = aligned.base.ids[:-1], aligned.teacher.ids
        embedded = timeline.measure("base_embedding", lambda: self.base.embed(mine))
        cache = timeline.measure("base_prefill", lambda: self.base.prefill(embedded))
        taught = timeline.measure("teacher_embedding", lambda: self.teacher.embed(theirs))
        teacher = timeline.measure("teacher_prefill", lambda: self.teacher.prefill(taught))
        rows = _rows(aligned.teacher_of[: len(mine)], self.base.device)
        if mine:
            for projector, (to, source) in zip(self.projectors, self.projectors.pairs, strict=True):
                _check_length(self.base.name, to, cache.layers[to], len(mine))
                _check_length(self.teacher.name, source, teacher.layers[source], len(theirs))
                pair = (cache.layers[to], teacher.layers[source])
                timeline.measure("projector", partial(_fuse, projector, *pair, *rows))
        return cache

    def _decode(self, token: int, cache: DynamicCache, max_new_tokens: int, timeline: Timeline) -> list[int]:
        found: list[int] = []
        while len(found) < max_new_tokens:
            token = timeline.measure("decode_step", partial(self.base.step, token, cache))
            found.append(token)
            if token in self.base.ends:
                break
        return found


def _rows(teacher_of: tuple[int | None, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the base's cache and of the teacher's, [pairs] int64 each."""
    pairs = [(mine, theirs) for mine, theirs in enumerate(teacher_of) if theirs is not None]
    both = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


def _fuse(projector: nn.Module, base: Any, teacher: Any, mine: Tensor, theirs: Tensor) -> None:
    """Write one layer's fused rows. Keys and values of a cache's layer are [1, heads, tokens, head_dim]."""
    own = (_rows_of(base.keys, mine), _rows_of(base.values, mine))
    keys, values = projector(own, (_rows_of(teacher.keys, theirs), _rows_of(teacher.values, theirs)))
    base.keys = _put(base.keys, mine, keys)
    base.values = _put(base.values, mine, values)


def _rows_of(cached: Tensor, rows: Tensor) -> Tensor:
    """[rows, heads, head_dim]"""
    return cached[0].index_select(1, rows).transpose(0, 1)


def _put(cached: Tensor, rows: Tensor, fused: Tensor) -> Tensor:
    return cached.index_copy(2, rows, fused.transpose(0, 1).unsqueeze(0))


def _check_length(name: str, number: int, layer: Any, tokens: int) -> None:
    kept = layer.keys.shape[2]
    if kept != tokens:
        raise ValueError(
            f"{name}: layer {number} keeps {kept} of the prompt's {tokens} tokens (a sliding window); it takes a layer "
            "that keeps all, or a shorter prompt"
        )
