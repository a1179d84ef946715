"""Text files as people have them: every encoding, JSON lists and JSON lines under either name, and what is refused."""

from __future__ import annotations

import bz2
import csv
import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ktverify.bench.c2c import prompts
from ktverify.system.text import json_rows, read_json, read_text
from ktverify.training.curves import Curve, read_curve
from ktverify.training.dataset import Exchange, read_records
from ktverify.training.yaml_file import read_yaml

CHINESE = "请用中文回答这个问题。"
ROWS = [{"instruction": f"{CHINESE} «é» {number}", "output": "好的。"} for number in range(3)]
LIST = json.dumps(ROWS, ensure_ascii=False, indent=1)
# as `cat` makes it of two files with a byte order mark
JOINED = "\n".join(f"\ufeff{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS)
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
TAKEN = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


@pytest.mark.parametrize("encoding", TAKEN)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    "text", [LIST, LINES, JOINED, LINES.rstrip(), "\n".join(json.dumps(row, indent=2) for row in ROWS)]
)
def test_records_are_read_whatever_the_encoding_and_the_name(
    encoding: str, name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_records(tmp_path / name) == [Exchange(row["instruction"], row["output"]) for row in ROWS]


@pytest.mark.parametrize("encoding", TAKEN)
def test_every_reader_takes_them(encoding: str, tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    points = [{"step": step, "loss": 5.0 - step} for step in (1, 2)]
    curve = Curve((1, 2), (4.0, 3.0))
    for name in ("loss.jsonl", "loss.json"):
        for text in (json.dumps(points), "".join(json.dumps(point) + "\n" for point in points)):
            assert read_curve(write(name, text)) == curve
        assert read_curve(write(name, json.dumps({"log_history": points}))) == curve
    assert read_yaml(write("a.yaml", f"dataset: {CHINESE}\n")) == {"dataset": CHINESE}
    assert read_json(write("index.json", '{"weight_map": {}}')) == {"weight_map": {}}
    rows = [{"prompt": None, "question": CHINESE}, {"prompt": "b"}]
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        assert prompts.of_file(write("p.jsonl", text), 0, None) == [CHINESE, "b"]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (LIST.encode("gb18030"), r"seems to be GBK, not UTF-8 \(line 3\); .*iconv -f GBK -t UTF-8 .*/a > NEW$"),
        ("日本語のテキスト。かなが多いです。".encode("shift_jis"), "seems to be SHIFT_JIS"),
        ("Größe ist nicht alles, sagt das Café.".encode("cp1252"), "seems to be WINDOWS-1252"),
        (LIST.encode("utf-16-le"), "seems to be UTF-16LE"),
        (b'[{"instruction": "a"}]'.decode().encode("utf-16-be"), "seems to be UTF-16BE"),
        (LIST.encode("utf-16")[:-1], "is no whole UTF-16: truncated data"),
        (b"PAR1\x00", "is a Parquet file; it takes text in UTF-8"),
        (b"\x1f\x8b\x08", "is a gzip archive"),
        (LIST.encode("utf-32-le"), "seems to be UTF-32LE"),
        (CHINESE.encode("utf-32-be"), "seems to be UTF-32BE"),
        (bz2.compress(LIST.encode()), "is no text; it takes text in UTF-8$"),
        (lzma.compress(LIST.encode()), "is no text"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00", "is no text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "is no text"),
    ],
)
def test_another_encoding_is_named(data: bytes, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a {wanted}"):
        json_rows(read_text(tmp_path / "a"), "a").__next__()


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding"), [("a b.csv", ",", "utf-8-sig"), ("it's.TSV", "\t", "utf-8")]
)
def test_what_is_said_about_a_table_works(name: str, delimiter: str, encoding: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    with pytest.raises(ValueError, match="is a CSV file; it takes JSON: ") as refused:
        read_records(tmp_path / name)
    command = str(refused.value).partition("it takes JSON: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [(found.prompt, found.answer) for found in read_records(tmp_path / "NEW.json")] == [
        (row["instruction"], row["output"]) for row in ROWS
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file")):
        with pytest.raises(ValueError, match=f"{path} cannot be read: {why}"):
            read_text(path)
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n")
    for read in (read_records, lambda path: prompts.of_file(path, 0, None)):
        with pytest.raises(ValueError, match=r"a\.csv is a CSV file; it takes JSON: python -c"):
            read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": 1}\n\n{"a": ', "here, line 3 is no JSON: Expecting value, column 7"),
        ('[{"a": 1},]', "here, line 1 is no JSON"),
        ('{"a": 1}\n{"b": 1, "b": 2}', "here, line 2: the key 'b' stands twice"),
        ("[" * 100_000, "here, line 1 is nested too deeply"),
        ("{'a': 1}", "here, line 1 is no JSON: Expecting property name"),
        ('{"a": 1}\n{"b": ' + "9" * 5000 + "}", "here, line 2: Exceeds the limit"),
    ],
)
def test_what_is_no_json_is_named_with_its_line(text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"^{wanted}"):
        list(json_rows(text, "here"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *((f"a: {text}", {"a": 1e-4}) for text in ("1e-4", "1E-4", "1.0e-4", "+1e-04", "1.e-4", ".1e-3", "100e-6")),
        ("a: '1e-4'\nb: 1e-4x\nc: e-4\n", {"a": "1e-4", "b": "1e-4x", "c": "e-4"}),
        ("a: &a {x: 0, y: 0}\nb: {<<: *a, x: 1}\n", {"a": {"x": 0, "y": 0}, "b": {"x": 1, "y": 0}}),
        ("a: &a {x: 0}\nb: &b {<<: *a, x: 1}\n<<: *b\nx: 2\n", {"a": {"x": 0}, "b": {"x": 1}, "x": 2}),
        ("a: yes\r\nb: off\r\n", {"a": True, "b": False}),
    ],
)
def test_what_yaml_means(text: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text, newline="")
    assert read_yaml(tmp_path / "a.yaml") == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml is no YAML: the key 'a' stands twice, again in line 3"),
        ("a: {b: 1, b: 2}\n", "the key 'b' stands twice"),
        ("a: [1\n", "is no YAML: while parsing"),
        ("a: 1\n---\nb: 2\n", "is no YAML: expected a single document"),
        ("? [1]\n: 2\n", "is no YAML"),
    ],
)
def test_what_is_no_yaml(text: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=wanted):
        read_yaml(tmp_path / "a.yaml")


def test_rows_that_are_not_wanted_may_be_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": 3}\n{"prompt": "b"}\n{"question": "c"}\n{"text": 1}\nno JSON\n')
    assert prompts.of_file(path, 1, 2) == ["b", "c"]
    for start, count, wanted in ((0, 1, "line 1: prompt is 3"), (1, 3, "line 4 has text"), (1, 4, "line 4 has text")):
        with pytest.raises(ValueError, match=wanted):
            prompts.of_file(path, start, count)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"instruction": "a", "input": None, "system": None, "output": "b"}, Exchange("a", "b")),
        ({"instruction": None, "input": "a", "output": "b", "history": None}, Exchange("a", "b")),
        ({"instruction": "a", "output": None}, Exchange("a", "")),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": None}]},
                    {"from": "gpt", "value": "b"},
                ]
            },
            Exchange("", "b"),
        ),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, Exchange("a", "b", "", (("c", "d"),))),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            Exchange("a", "b", "s"),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            Exchange("c", "d", "s", (("a", "b"),)),
        ),
    ],
)
def test_forms_of_a_record(row: dict[str, Any], wanted: Exchange, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_records(tmp_path / "a.json") == [wanted]


USER, ANSWER = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (3, "record 2 is a int"),
        ({"instruction": "a\ud800", "output": "b"}, r"record 2 has half a surrogate pair, \\ud800, at character 1"),
        ({"conversations": [USER, {"from": "gpt", "value": "\udfff"}]}, "record 2 has half a surrogate pair"),
        ({"text": "a"}, "record 2 has text; it takes instruction and output, conversations or messages"),
        ({"instruction": "a", "output": ["b"]}, "record 2: output is a list, it takes text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "record 2: history has c; it takes pairs"),
        ({"instruction": "a", "output": "b", "history": 5}, "record 2: history has 5; it takes pairs"),
        (
            {"instruction": "a", "output": "b", "history": {"c": "d"}},
            "record 2: history has {'c': 'd'}; it takes pairs",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "message 1: text is a int, it takes",
        ),
        ({"conversations": "a"}, "record 2, conversations is a str; it takes a list of messages"),
        ({"conversations": []}, "conversations has nothing; it takes user and assistant in turn"),
        ({"conversations": [USER]}, "conversations has user; it takes user and assistant in turn, ending with assist"),
        ({"conversations": [ANSWER, USER, ANSWER]}, "has assistant, user, assistant; it takes"),
        ({"conversations": [USER, {"from": "tool", "value": "x"}]}, "message 2 has the role 'tool', which is not used"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: content is a int, it takes text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "message 1 has a tool call"),
        ({"messages": [], "tools": [{}]}, "record 2 has tools, which is not used here"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(row: object, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], row]))
    with pytest.raises(ValueError, match=wanted):
        read_records(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], row, row, row]))
    with pytest.raises(ValueError, match=r"; 2 more records cannot be used$"):
        read_records(tmp_path / "a.json")
