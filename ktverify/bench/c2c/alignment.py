"""Which token of the teacher tells about which token of the base, where the two have different tokenizers.

Comes in: a prompt and two tokenizers. Goes out: both models' tokens, and pairs of positions. Each model gets the prompt
in its own chat template. What both texts share is the prompt (or all, where they are equal), and tokens meet by the
characters that they cover there; tokens that are one model's template alone meet nobody. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]  # characters from begin to before end; (0, 0): none
_NOBODY: Span = (0, 0)
_MARK = "\N{BLACK SQUARE}ktverify\N{BLACK SQUARE}"  # stands for the prompt, to see where a template puts it


@dataclass(frozen=True)
class Tokens:
    """A text's tokens: ids, the characters that each covers, and where in the text the prompt begins."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    begin: int


@dataclass(frozen=True)
class Aligned:
    """Both models' tokens. teacher_of[i]: the position in the teacher's tokens for the base's token i, None without."""

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
    """The prompt's tokens; with a template they end where the answer begins, without one as the tokenizer ends them."""
    if not tokenizer.is_fast:
        raise ValueError(f"{_name(tokenizer)} has a slow tokenizer, which tells no offsets; it takes a fast one")
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
    """For each of the base's spans the teacher's token that shares most characters with it, None where none does.

    Of several that share as many it is the last, which has read most. Both in the order of the text, spans without
    characters aside. O(tokens).
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
    # templates that know no thinking ignore it
    text: str = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


def _within(tokens: Tokens, length: int) -> list[Span]:
    """The spans inside the prompt, counted from its beginning; what is outside covers nothing."""
    cut = ((max(first - tokens.begin, 0), min(last - tokens.begin, length)) for first, last in tokens.spans)
    return [(first, last) if first < last else _NOBODY for first, last in cut]


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
