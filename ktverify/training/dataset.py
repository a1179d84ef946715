"""Alpaca-style data: JSON or JSON lines of {instruction, input, output[, system]}, made into input_ids and labels.

The tokenizer's chat template is applied, and only the answer has labels. Light until a tokenizer is used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ktverify.training.tokens import first_tokens

IGNORED = -100  # the label that torch's cross entropy leaves out
EXAMPLE = "alpaca_tiny"


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer, and a system message or ""."""

    prompt: str
    answer: str
    system: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for text in (self.system, self.prompt, self.answer) if text)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All but the answer, in the form that a chat template takes."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


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


def read_records(path: Path) -> list[Exchange]:
    """The records of a JSON list or of JSON lines. ValueError, with the record's number, for other data or none."""
    text = path.read_text(encoding="utf-8")
    rows: Any = []
    if path.suffix == ".jsonl":
        # split at "\n" only, because splitlines also splits at characters that JSON texts may contain
        lines = enumerate(text.split("\n"), start=1)
        rows = [_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    elif text.strip():
        rows = _json(text, str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; it takes a list of records, or JSON lines")
    if not rows:
        raise ValueError(f"{path} holds no record; it takes at least one of instruction, input, output")
    return [_record(row, f"{path}, record {number}") for number, row in enumerate(rows, start=1)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None


def _record(row: Any, where: str) -> Exchange:
    if not isinstance(row, dict) or "instruction" not in row or "output" not in row:
        raise ValueError(f"{where} has no instruction and output: {str(row)[:80]}")
    for key in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{where}: {key} is a {type(row[key]).__name__}, it takes text")
    if row.get("history"):
        raise ValueError(f"{where} has a history, which is not used here: take the earlier turns out, or the record")
    prompt = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    return Exchange(prompt, row["output"], row.get("system", ""))


def encode(
    records: Sequence[Exchange], tokenizer: Any, cutoff_len: int, *, workers: int = 1
) -> list[dict[str, list[int]]]:
    """input_ids and labels (prompt masked) of each record, cut at cutoff_len tokens; computed by `workers` threads.

    Records without any label after the cut are left out, and a line on stderr states how many. ValueError where the
    tokenizer has no chat template, or no record has a label; with the record's number where its text is too long."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, and template: default takes the tokenizer's own")
    with ThreadPoolExecutor(workers) as pool:
        numbered = enumerate(records, start=1)
        rows = list(pool.map(lambda pair: _encode_one(pair[0], pair[1], tokenizer, cutoff_len), numbered))
    answered = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    if not answered:
        raise ValueError(f"cutoff_len {cutoff_len} leaves nothing of any answer; raise it")
    if len(answered) < len(rows):
        missing = f"{len(rows) - len(answered)} of {len(rows)} records are left out"
        print(f"{missing}: cutoff_len {cutoff_len} leaves nothing of their answers", file=sys.stderr)
    return answered


def _encode_one(number: int, record: Exchange, tokenizer: Any, cutoff_len: int) -> dict[str, list[int]]:
    answer = {"role": "assistant", "content": record.answer}
    # the template gets the whole texts, because it may look at their ends
    asked = tokenizer.apply_chat_template(record.messages, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*record.messages, answer], tokenize=False)
    try:
        prompt, whole = (first_tokens(part, tokenizer, cutoff_len) for part in (asked, text))
    except ValueError as error:
        raise ValueError(f"record {number} is too long to be cut at cutoff_len {cutoff_len}: {error}") from None
    # a template may tokenize the beginning of the answer differently from its prompt: mask their common beginning
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    labels = [IGNORED] * shared + whole[shared:]
    return {"input_ids": whole, "labels": labels}
