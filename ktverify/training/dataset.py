"""Data sets in JSON or JSON lines, of alpaca's, ShareGPT's or OpenAI's form, made into input_ids and labels.

The tokenizer's chat template is applied, and only the answers have labels. Light until a tokenizer is used.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ktverify.errors import is_expected, one_line
from ktverify.system.text import check_characters, json_rows, no_table, read_text
from ktverify.training.tokens import first_tokens

IGNORED = -100  # the label that torch's cross entropy leaves out
EXAMPLE = "alpaca_tiny"
# how messages name their speakers, in ShareGPT's form and in OpenAI's
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_UNUSED = ("tools", "images", "videos", "audios")


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer; a system message or ""; earlier pairs of the same; where it was read."""

    prompt: str
    answer: str
    system: str = ""
    earlier: tuple[tuple[str, str], ...] = ()
    where: str = field(default="", compare=False)

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        return (*self.earlier, (self.prompt, self.answer))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for text in (self.system, *itertools.chain(*self.turns)) if text)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All texts in the form that a chat template takes."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        roles = itertools.cycle(("user", "assistant"))
        return [*system, *({"role": next(roles), "content": text} for text in itertools.chain(*self.turns))]


def example_data() -> Path:
    """The example data set that comes with the package."""
    return Path(str(resources.files("ktverify.training") / "data" / f"{EXAMPLE}.json"))


def find_dataset(name: str, beside: Path) -> Path:
    """The file of a data set: a path, also relative to the directory `beside`, or the name of the example data.

    ValueError where there is none."""
    if name == EXAMPLE:
        return example_data()
    for path in (Path(name), beside / name):
        if path.is_file():
            return path
    raise ValueError(f"dataset {name!r} is no file; it takes the path of a JSON or JSONL file, or {EXAMPLE}")


def read_records(path: Path, limit: int | None = None) -> list[Exchange]:
    """The records of a JSON list or of JSON lines, in the forms that docs/training.md lists; the first `limit`.

    ValueError, with the place of the first record that is in none of them, or for no record."""
    no_table(path)
    records, faults = [], []
    for where, row in itertools.islice(json_rows(read_text(path), str(path)), limit):
        try:
            records.append(_record(row, where))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        more = f"; {len(faults) - 1} more records cannot be used" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")
    if not records:
        raise ValueError(f"{path} holds no record; it takes at least one of instruction, input, output")
    return records


def _record(row: Any, where: str) -> Exchange:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}; it takes an object with instruction and output")
    unused = next((key for key in _UNUSED if row.get(key)), None)
    if unused:
        raise ValueError(f"{where} has {unused}, which is not used here: take it out, or the record")
    chat = next((key for key in ("conversations", "messages") if row.get(key) is not None), None)
    if chat:
        return _of_chat(row[chat], _text(row, "system", where), f"{where}, {chat}", where)
    if "instruction" not in row or "output" not in row:
        keys = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"{where} has {keys[:80]}; it takes instruction and output, conversations or messages")
    prompt = "\n".join(part for part in (_text(row, "instruction", where), _text(row, "input", where)) if part)
    earlier = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{where}: history has {str(pair)[:40]}; it takes pairs of a prompt and its answer")
        earlier.append((pair[0], pair[1]))
    made = Exchange(prompt, _text(row, "output", where), _text(row, "system", where), tuple(earlier), where)
    return _checked(made)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    """The text of a key; "" for null, and where it is left out."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} is a {type(value).__name__}, it takes text")
    return value or ""


def _of_chat(given: Any, system: str, place: str, where: str) -> Exchange:
    """A list of {from, value} or of {role, content}: a system message, then prompts and answers in turn."""
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise ValueError(f"{place} is a {type(given).__name__}; it takes a list of messages")
    said = [_message(message, f"{place}, message {number}") for number, message in enumerate(given, start=1)]
    if said and said[0][0] == "system":
        if system:
            raise ValueError(f"{where} has two system messages")
        system = said.pop(0)[1]
    roles = [role for role, _ in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        order = ", ".join(roles[:6]) or "nothing"
        raise ValueError(f"{place} has {order}; it takes user and assistant in turn, ending with assistant")
    texts = [text for _, text in said]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    return _checked(Exchange(*turns[-1], system, tuple(turns[:-1]), where))


def _message(message: dict[str, Any], place: str) -> tuple[str, str]:
    """(role, text) of one message."""
    given, content = (message.get(one, message.get(other)) for one, other in (("role", "from"), ("content", "value")))
    role = _ROLES.get(str(given))
    if role is None or message.get("tool_calls"):
        what = "a tool call" if role else f"the role {given!r}"
        raise ValueError(f"{place} has {what}, which is not used here; it takes {', '.join(_ROLES)}")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "\n".join(_text(part, "text", place) for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{place}: content is a {type(content).__name__}, it takes text")
    return role, content or ""


def _checked(record: Exchange) -> Exchange:
    for text in record.texts:
        check_characters(text, record.where)
    return record


def encode(
    records: Sequence[Exchange], tokenizer: Any, cutoff_len: int, *, workers: int = 1
) -> list[dict[str, list[int]]]:
    """input_ids and labels (answers only) of each record, cut at cutoff_len tokens; computed by `workers` threads.

    Records without an answer, or without any label after the cut, are left out, and a line on stderr states how many.
    ValueError where the tokenizer has no chat template, or no record has a label; with the record where the template
    refuses it or its text is too long."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, and template: default takes the tokenizer's own")
    asked = [record for record in records if any(answer.strip() for _, answer in record.turns)]
    if not asked:
        raise ValueError(f"no record has an answer: all {len(records)} are empty")
    if len(asked) < len(records):
        first = next(record.where for record in records if not any(answer.strip() for _, answer in record.turns))
        print(
            f"{len(records) - len(asked)} of {len(records)} records are left out: their answers are empty; the first "
            f"is {first}",
            file=sys.stderr,
        )
    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(lambda record: _encode_one(record, tokenizer, cutoff_len), asked))
    answered = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    if not answered:
        raise ValueError(f"cutoff_len {cutoff_len} leaves nothing of any answer; raise it")
    if len(answered) < len(rows):
        missing = f"{len(rows) - len(answered)} of {len(rows)} records are left out"
        print(f"{missing}: cutoff_len {cutoff_len} leaves nothing of their answers", file=sys.stderr)
    return answered


def _encode_one(record: Exchange, tokenizer: Any, cutoff_len: int) -> dict[str, list[int]]:
    texts = _texts(record, tokenizer)
    try:
        whole, *others = (first_tokens(text, tokenizer, cutoff_len) for text in texts)
    except ValueError as error:
        raise ValueError(f"{record.where} is too long to be cut at cutoff_len {cutoff_len}: {error}") from None
    labels = [IGNORED] * len(whole)
    for prompt, until in zip(others[::2], others[1::2], strict=True):
        answer = slice(_common(prompt, whole), _common(until, whole))
        labels[answer] = whole[answer]
    return {"input_ids": whole, "labels": labels}


def _texts(record: Exchange, tokenizer: Any) -> list[str]:
    """The whole record in the chat template, and before and after each answer that is not empty. ValueError for a
    record that the template refuses.

    Each beginning is made by the template, which may write an answer unlike its prompt, or earlier turns differently.
    """
    messages = record.messages
    answers = [
        count for count in range(len(messages) % 2 + 2, len(messages) + 1, 2) if messages[count - 1]["content"].strip()
    ]
    try:
        found = [tokenizer.apply_chat_template(messages, tokenize=False)]
        for count in answers:
            asked, until = messages[: count - 1], messages[:count]
            found.append(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
            found.append(tokenizer.apply_chat_template(until, tokenize=False))
    except Exception as error:
        if not is_expected(error):
            raise
        raise ValueError(f"{record.where}: the tokenizer's chat template refuses it: {one_line(error)}") from error
    return found


def _common(one: list[int], other: list[int]) -> int:
    """The length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
