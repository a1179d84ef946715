"""Where prompts come from: a file or a data set, from a start on; what is no prompt is refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ktverify.bench.c2c import prompts
from tests.support import c2c
from tests.support.command_line import call, refused


def test_a_file_of_prompts_is_read_from_start(tmp_path: Path) -> None:
    given = c2c.write_prompts(tmp_path / "p.jsonl", 5)
    assert prompts.of_file(given, 3, None) == ["Wie groß\u2028ist 3 + 3?", "Wie groß\u2028ist 4 + 4?"]
    assert prompts.of_file(given, 1, 1) == ["Wie groß\u2028ist 1 + 1?"]


class Table(list[dict[str, str]]):
    """What load_dataset returns, as far as it is used."""

    def select(self, rows: range) -> Table:
        return Table(self[number] for number in rows)


def test_a_data_set_is_read_from_start(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(*arguments: object, split: str) -> Table:
        asked.append((*arguments, split))
        return Table({"question": f"question {number}", "answer": "no"} for number in range(6))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert prompts.of_dataset("some/set", "main", "test", 4, 5) == ["question 4", "question 5"]
    assert asked == [("some/set", "main", "test")]
    with pytest.raises(ValueError, match="has 6 prompts, --start is 6; there is none to run"):
        prompts.of_dataset("some/set", None, "test", 6, 1)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{", "line 3 is no JSON"),
        ("[1]", "line 2 is a list, it takes an object with prompt or question"),
        ('{"text": "x"}', "line 2 has text; it takes prompt or question"),
        ('{"prompt": 3}', "line 2: prompt is 3, it takes text"),
        ('{"prompt": " "}', "line 2: prompt is ' ', it takes text"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    refused(call("bench", "c2c", "dataset", "--dataset_file", str(path)), wanted)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    wanted = r"--dataset needs the datasets library.*pip install .* -e '\.\[datasets\]', or give --dataset_file"
    refused(call("bench", "c2c", "dataset", "--dataset", "some/set"), wanted)
