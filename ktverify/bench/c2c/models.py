"""One of the two models: embedding, prefill, one step of decoding, and the shapes of its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ktverify.bench.c2c.projector import Heads, LayerShape
from ktverify.training.pretrained import load_pretrained
from ktverify.training.tokens import is_longer


class Side:
    """A causal model, its tokenizer, and the option that names it."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.device = next(model.parameters()).device
        self._decoder = model.get_decoder()
        self.ends = _end_tokens(model, tokenizer)

    def embed(self, ids: tuple[int, ...]) -> Tensor:
        """[1, n, hidden] of n token ids."""
        found: Tensor = self.model.get_input_embeddings()(torch.tensor([ids], device=self.device, dtype=torch.int64))
        return found

    def prefill(self, embeddings: Tensor) -> DynamicCache:
        """The cache of all layers after embeddings [1, n, hidden], empty for n = 0. Computes no logits."""
        cache = DynamicCache(config=self.model.config)
        if embeddings.shape[1]:
            self._decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        return cache

    def step(self, token: int, cache: DynamicCache) -> int:
        """The most likely token after `token`, whose keys and values are added to the cache. Waits for the device."""
        ids = torch.tensor([[token]], device=self.device)
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return int(logits[0, -1].argmax())

    @property
    def longest(self) -> int:
        """The most tokens that the model takes; 2^20 for one that does not say."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 20)

    def check_length(self, prompt: str, where: str) -> None:
        """ValueError, without tokenising a whole long prompt, where it has more than `longest` tokens."""
        try:
            too_long = is_longer(prompt, self.tokenizer, self.longest)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if too_long:
            raise ValueError(f"{where} has more than the {self.longest} tokens that {self.name} takes; make it shorter")

    def cache_shapes(self) -> list[LayerShape]:
        """What each layer caches for a token, found by one prefill. ValueError for a layer without keys and values."""
        with torch.inference_mode():
            cache = self.prefill(self.embed((0,)))
        return [_shape(self.name, number, layer) for number, layer in enumerate(cache.layers)]


def load_side(path: str, option: str, *, dtype: str, device: str) -> Side:
    """Load a model and its tokenizer from a directory or by a hub's name. ValueError that names `option`."""
    model, tokenizer = load_pretrained(path, dtype, option=option)
    return Side(model.to(device), tokenizer, path)


def _shape(name: str, number: int, layer: Any) -> LayerShape:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() != 4:
        raise ValueError(
            f"{name}: layer {number} ({type(layer).__name__}) keeps no keys and values; it takes attention"
        )
    return LayerShape(Heads(keys.shape[1], keys.shape[3]), Heads(values.shape[1], values.shape[3]))


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a response: those of the model's generation config, else the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = tokenizer.eos_token_id
    found = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(int(token) for token in found if token is not None)
