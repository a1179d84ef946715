"""The first tokens of a text, without tokenising more of it than they need.

A tokenizer takes a hundred bytes and more for each character.
"""

from __future__ import annotations

from typing import Any

# characters for each wanted token, in the first attempt; more than any language's tokens have on the average
_GENEROUS = 16
_SHORTEST = 1 << 14
# characters beyond which the wanted tokens are not looked for: a tokenizer then takes gigabytes
_LONGEST = 1 << 23


def first_tokens(text: str, tokenizer: Any, count: int) -> list[int]:
    """The first `count` token ids of a text, without special tokens; all of them where it has fewer.

    Of a long text, only a beginning is tokenised. Its first `count` tokens count where they are at most half of its
    tokens, and where a beginning twice as long has the same: a tokenizer decides from left to right, by what is near.
    ValueError where no beginning of up to 8 million characters shows them.
    """
    length, before = max(_SHORTEST, _GENEROUS * count), None
    while length < len(text):
        if length > _LONGEST:
            shown = f"its first {length // 2} characters do not show its first {count} tokens"
            raise ValueError(f"{shown}; make it shorter")
        ids = _tokenized(text[:length], tokenizer)
        if before is not None and len(before) >= 2 * count and ids[:count] == before[:count]:
            return ids[:count]
        length, before = 2 * length, ids
    return _tokenized(text, tokenizer)[:count]


def is_longer(text: str, tokenizer: Any, count: int) -> bool:
    """Whether a text has more than `count` tokens, found like `first_tokens`. ValueError as there."""
    return len(first_tokens(text, tokenizer, count + 1)) > count


def _tokenized(text: str, tokenizer: Any) -> list[int]:
    # no warning that a text is longer than the model's context: it is cut
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
