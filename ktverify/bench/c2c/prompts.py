"""Prompts: five built-in ones, a file of JSON lines, or a data set of the datasets library. Imports no torch.

They keep the order of the data set, from number `start` on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ktverify.system.files import install_command
from ktverify.system.text import check_characters, json_rows, no_table, read_text

COLUMNS = ("prompt", "question")
# short and long, prose, code, arithmetic, and characters beyond ASCII
BUILT_IN = (
    "Why is the sky blue?",
    "A train leaves at 9:40 and arrives at 13:05. It stops three times for 4 minutes each. How long does it move?",
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "Explain in three sentences what a key-value cache of a language model holds, and why it makes decoding faster.",
    "Translate into French: »Größe ist nicht alles« – said the naïve café owner.",
)


def built_in() -> list[str]:
    return list(BUILT_IN)


def of_file(path: Path, start: int, count: int | None) -> list[str]:
    """`count` prompts (None: all) of a file of JSON lines with prompt or question, from number `start` on, from 0."""
    try:
        no_table(path)
        rows = json_rows(read_text(path), str(path))
    except ValueError as error:
        raise ValueError(f"--dataset_file {error}") from None
    # rows beyond the wanted ones are not read, and may be in any form
    wanted = itertools.islice(rows, None if count is None else start + count)
    found = [_prompt(row, where) if number >= start else "" for number, (where, row) in enumerate(wanted)]
    return _not_empty(found[start:], str(path), start, len(found))


def of_dataset(name: str, subset: str | None, split: str, start: int, count: int | None) -> list[str]:
    """The same from a data set of the hub or of a directory, by the datasets library. ImportError without it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"--dataset needs the datasets library ({error}): {install_command('datasets')}, or give --dataset_file"
        ) from None
    try:
        table = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"--dataset {name!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    length = len(table)
    end = length if count is None else min(length, start + count)
    rows: Iterable[Mapping[str, Any]] = table.select(range(min(start, length), end))
    found = [_prompt(row, f"{name}, row {number}") for number, row in enumerate(rows, start=start)]
    return _not_empty(found, f"{name}, split {split}", start, length)


def _not_empty(chosen: list[str], where: str, start: int, length: int) -> list[str]:
    if not chosen:
        raise ValueError(f"{where} has {length} prompts, --start is {start}; there is none to run")
    return chosen


def _prompt(row: Any, where: str) -> str:
    """The text of a row, without the spaces around it, because chat templates remove them."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, it takes an object with {' or '.join(COLUMNS)}")
    name = next((column for column in COLUMNS if row.get(column) is not None), None)
    if name is None:
        raise ValueError(f"{where} has {', '.join(map(str, row)) or 'nothing'}; it takes {' or '.join(COLUMNS)}")
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"{where}: {name} is {row[name]!r}, it takes text")
    return check_characters(str(row[name]).strip(), where)
