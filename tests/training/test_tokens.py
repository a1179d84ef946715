"""The first tokens of a long text are those of the whole, and take no more memory than they need."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ktverify.training import tokens
from ktverify.training.dataset import Exchange, encode, read_records
from ktverify.training.tokens import first_tokens

WORDS = "the layer keeps its weights, and every expert's gate is a matrix; λόγος ist naïve — 東京 is 42.5 km away"


def corpus(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS.split()) + draw.choice([" ", " ", "\n", "  \n\n", ""]) for _ in range(count))


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of each kind that models have."""
    made: dict[str, tuple[Any, Any, Any, Any]] = {
        "bytes": (models.BPE(), trainers.BpeTrainer(vocab_size=400), None, pre_tokenizers.ByteLevel(False)),
        "no splits": (models.BPE(), trainers.BpeTrainer(vocab_size=400), normalizers.Replace(" ", "▁"), None),
        "unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"]),
            normalizers.NFKC(),
            pre_tokenizers.Metaspace(),
        ),
        "words": (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"]),
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        ),
    }
    model, trainer, normalizer, splitter = made[kind]
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator([corpus(seed, 200) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Counting:
    """A tokenizer that counts the characters that it got."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.characters = tokenizer, 0
        self.chat_template = "there is one"

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.mark.parametrize("kind", ["bytes", "no splits", "unigram", "words"])
def test_the_first_tokens_are_those_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_SHORTEST", 64)
    counting = Counting(trained(kind))
    for seed in range(40):
        text = corpus(seed, 3000)
        count = 1 + seed * 3
        expected = counting.tokenizer(text, add_special_tokens=False)["input_ids"][:count]
        counting.characters = 0
        assert first_tokens(text, counting, count) == expected
        assert counting.characters < len(text)


@pytest.mark.parametrize("text", ["", "a", "a" * 100, " " * 5000, "\n" * 5000, "x" * 5000 + " the end"])
@pytest.mark.parametrize("count", [1, 7, 100_000])
def test_texts_without_borders(text: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_SHORTEST", 64)
    for kind in ("bytes", "unigram"):
        tokenizer = trained(kind)
        expected = tokenizer(text, add_special_tokens=False)["input_ids"][:count]
        assert first_tokens(text, tokenizer, count) == expected


def test_a_text_that_shows_no_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_SHORTEST", 64)
    monkeypatch.setattr(tokens, "_LONGEST", 1 << 12)
    counting = Counting(trained("words"))
    record = Exchange("short", "x" * 100_000, where="record 2")
    with pytest.raises(ValueError, match=r"record 2 is too long to be cut at cutoff_len 32: its first 4096 characters"):
        encode([Exchange("a", "b"), record], counting, 32)
    assert counting.characters < 20_000


def test_a_line_of_megabytes_is_cut_before_it_is_tokenized(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    words = corpus(1, 20_000).replace("\n", " ").replace('"', "")
    path.write_text('{"instruction": "' + "say it" + '", "output": "' + words * 20 + '"}\n', encoding="utf-8")
    counting = Counting(trained("bytes"))
    (row,) = encode(read_records(path), counting, 32)
    assert len(row["input_ids"]) == len(row["labels"]) == 32
    assert counting.characters < 100_000 < path.stat().st_size / 10
    short = Exchange("say it", words[:5000])
    assert encode([short], counting, 32) == [row]
