"""Read the text files that people write: their encoding, JSON lists and JSON lines. Errors name the file, in one line.

Everything that a user may have edited is read here: data sets, prompts, configurations, loss histories, indexes.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# longest first: the mark of UTF-16 is the beginning of that of UTF-32
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# what a file that is no text begins with
_OTHER = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"\x1f\x8b": "a gzip archive",
    b"ARROW1": "an Arrow file",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}
# whether most bytes at a place modulo 4 are zero -> the encoding of such text
_WIDE: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (False, False, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (True, True, False, False): "UTF-32BE",
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # in no text of any encoding of _guess
# JSON's, and the byte order mark of a file that was appended to another one
_SPACE = re.compile("[ \t\n\r\ufeff]*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, which is left out.

    ValueError for another encoding, with the one that it seems to be, for a file of another kind, and for one that
    cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    return decode(data, path)


def decode(data: bytes, path: Path) -> str:
    """The text of `data`, as `read_text` reads it; `path` is named in errors."""
    kind = next((kind for start, kind in _OTHER.items() if data.startswith(start)), "")
    if kind:
        raise ValueError(f"{path} is {kind}; it takes text in UTF-8")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    wide = _wide(data) if encoding == "utf-8" else ""  # text in ASCII would pass as UTF-8 with zeros between
    try:
        if not wide:
            return data.decode(encoding)
        line = 1
    except UnicodeDecodeError as error:
        if encoding not in ("utf-8", "utf-8-sig"):
            raise ValueError(f"{path} is no whole {encoding.upper()}: {error.reason}, byte {error.start}") from None
        line = data.count(b"\n", 0, error.start) + 1
    if not wide and _CONTROL.search(data):
        raise ValueError(f"{path} is no text; it takes text in UTF-8")
    seems = wide or _guess(data)
    convert = f"; convert it: iconv -f {seems} -t UTF-8 {shlex.quote(str(path))} > NEW" if seems else ""
    found = f"seems to be {seems}" if seems else "is in no known encoding"
    raise ValueError(f"{path} {found}, not UTF-8 (line {line}); it takes UTF-8{convert}")


def _wide(data: bytes) -> str:
    """The encoding, UTF-16LE for one, of bytes that seem to be wide characters without a byte order mark, else ""."""
    columns = [data[:4096][place::4] for place in range(4)]
    return _WIDE.get(tuple(column.count(0) * 2 > len(column) for column in columns), "")


def _guess(data: bytes) -> str:
    """The encoding that bytes which are no UTF-8 seem to have; "" where none fits."""
    # most bytes are some text in each: Japanese has kana, Chinese consists of the usual characters
    for codec, name, usual, share in (
        ("shift_jis", "SHIFT_JIS", "[\u3040-\u30ff]", 0.2),
        ("gb18030", "GBK", "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]", 0.8),
        ("cp1252", "WINDOWS-1252", "", 0),
    ):
        try:
            others = [c for c in data.decode(codec) if ord(c) > 127]
        except UnicodeDecodeError:
            continue
        if sum(bool(re.match(usual, c)) for c in others) >= share * len(others):
            return name
    return ""


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. ValueError for anything else; `where` is named."""
    values = [value for _, value in json_values(text, where)]
    if len(values) != 1:
        raise ValueError(f"{where} is no JSON: it has {len(values)} values, and takes one")
    return values[0]


def read_json(path: Path, kind: type = dict) -> Any:
    """The one JSON value of a file, of type `kind`. ValueError for anything else."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}; it takes a {kind.__name__}")
    return value


def json_rows(text: str, where: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of each record of a JSON list, or of JSON lines, whatever the file is called.

    ValueError for text that is neither, with its line; not before that line is reached."""
    values = json_values(text, where)
    first = next(values, None)
    second = next(values, None) if first and isinstance(first[1], list) else None
    if first and isinstance(first[1], list) and not second:
        yield from ((f"{where}, record {number}", row) for number, row in enumerate(first[1], start=1))
        return
    for line, value in itertools.chain(filter(None, (first, second)), values):
        yield f"{where}, line {line}", value


def json_values(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of the JSON values that follow each other in `text`. ValueError with the line of what is none."""
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    at, line, counted = _skip(text, 0), 1, 0
    while at < len(text):
        # lines are counted by "\n" only: a JSON text may contain U+2028 and similar characters
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, line {error.lineno} is no JSON: {error.msg}, column {error.colno}") from None
        except ValueError as error:  # a key twice, or a number of more digits than Python reads
            raise ValueError(f"{where}, line {line}: {error}") from None
        except RecursionError:
            raise ValueError(f"{where}, line {line} is nested too deeply") from None
        yield line, value
        at = _skip(text, end)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


def check_characters(text: str, where: str) -> str:
    """`text`. ValueError for half a surrogate pair, which JSON can write and no encoding takes."""
    half = _SURROGATE.search(text)
    if half:
        raise ValueError(f"{where} has half a surrogate pair, \\u{ord(half[0]):x}, at character {half.start()}")
    return text


def no_table(path: Path) -> None:
    """ValueError for the name of a file of comma-separated values."""
    if path.suffix.lower() in (".csv", ".tsv"):
        # a spreadsheet's begins with a byte order mark
        tabs = ', delimiter="\\t"' if path.suffix.lower() == ".tsv" else ""
        rows = f'csv.DictReader(open(0, encoding="utf-8-sig"){tabs})'
        convert = f"python -c 'import csv, json; print(json.dumps(list({rows})))' < {shlex.quote(str(path))} > NEW.json"
        raise ValueError(f"{path} is a CSV file; it takes JSON: {convert}")
