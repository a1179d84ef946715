"""Align the tokens of two models that have different tokenizers.

Each model gets the prompt in its own chat template. Tokens are aligned by the characters of the prompt that they cover,
or by those of the whole text if both texts are equal. A token that lies only in a template has no partner. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]  # characters from begin to before end; (0, 0): none
_NO_SPAN: Span = (0, 0)
_MARK = "\N{BLACK SQUARE}ktverify\N{BLACK SQUARE}"  # in place of the prompt, to find where a template puts it


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text: ids, the characters that each covers, and the position of the prompt in the text."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    begin: int


@dataclass(frozen=True)
class Aligned:
    """Both models' tokens. teacher_of[i]: position of the teacher's token for the base's token i, None without one."""

    base: Tokens
    teacher: Tokens
    teacher_of: tuple[int | None, ...]


def align_prompt(prompt: str, base: Any, teacher: Any, *, template: bool) -> Aligned:
    """Tokens of `prompt` by both tokenizers, in their chat templates if `template` and if they have one.

    ValueError for an empty prompt, a tokenizer without character offsets, or a template that changes the prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty; it takes text")
    mine, theirs = (tokenize(prompt, tokenizer, template=template) for tokenizer in (base, teacher))
    if mine.text == theirs.text:
        return Aligned(mine, theirs, match(mine.spans, theirs.spans))
    shared = (_within(tokens, len(prompt)) for tokens in (mine, theirs))
    return Aligned(mine, theirs, match(*shared))


def tokenize(prompt: str, tokenizer: Any, *, template: bool) -> Tokens:
    """The prompt's tokens. With a template they end where the answer begins."""
    if not tokenizer.is_fast:
        raise ValueError(f"{_name(tokenizer)} has a slow tokenizer, which gives no offsets; it takes a fast one")
    text, begin = prompt, 0
    templated = template and bool(tokenizer.chat_template)
    if templated:
        text, begin = _render(prompt, tokenizer), _render(_MARK, tokenizer).find(_MARK)
        if begin < 0 or text[begin : begin + len(prompt)] != prompt:
            raise ValueError(
                f"the chat template of {_name(tokenizer)} changes the prompt {prompt[:40]!r}; give --no-template, "
                "or the prompt without spaces around it"
            )
    encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    spans = tuple((int(first), int(last)) for first, last in encoded["offset_mapping"])
    return Tokens(text, tuple(encoded["input_ids"]), spans, begin)


def match(base: Sequence[Span], teacher: Sequence[Span]) -> tuple[int | None, ...]:
    """For each span of the base the teacher's token that shares most characters with it, None without one.

    Of several equal ones the last, because it has read most of the text. Spans with characters are in the order of the
    text. O(tokens).
    """
    found: list[int | None] = []
    first = 0
    for begin, end in base:
        if begin == end:
            found.append(None)
            continue
        while first < len(teacher) and teacher[first][1] <= begin:
            first += 1
        best, most, at = None, 1, first
        while at < len(teacher) and teacher[at][0] < end:
            common = min(end, teacher[at][1]) - max(begin, teacher[at][0])
            if common >= most:
                best, most = at, common
            at += 1
        found.append(best)
    return tuple(found)


def _render(prompt: str, tokenizer: Any) -> str:
    message = [{"role": "user", "content": prompt}]
    # a template without a thinking mode ignores enable_thinking
    text: str = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


def _within(tokens: Tokens, length: int) -> list[Span]:
    """The spans inside the prompt, counted from its beginning; others are empty."""
    cut = ((max(first - tokens.begin, 0), min(last - tokens.begin, length)) for first, last in tokens.spans)
    return [(first, last) if first < last else _NO_SPAN for first, last in cut]


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
