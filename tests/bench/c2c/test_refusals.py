"""Where prompts come from, what is refused in one line, and that help is there at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ktverify.bench.c2c import prompts
from tests.support import c2c
from tests.support.command_line import call, ends, loaded_modules, refused

# ---- data sets


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


# ---- refusals, and a light start


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{", "line 2 is no JSON"),
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


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["batch", "--base_model", "./nothing"], r"--base_model './nothing' is no directory"),
        (["batch", "--dtype", "int4"], "--dtype is 'int4', it takes bfloat16 or float32"),
        (["batch", "--device", "tpu"], "--device is 'tpu', it takes cpu or cuda"),
        (["batch", "--projectors", "nothing.safetensors"], "--projectors nothing.safetensors cannot be read"),
        (["batch", "--output", "x.json"], "x.json does not end in .jsonl"),
        (["dataset"], "give either --dataset NAME or --dataset_file FILE"),
        (["dataset", "--dataset_file", "nothing.jsonl"], "--dataset_file nothing.jsonl cannot be read"),
        (["dataset", "--dataset_file", "@", "--shard", "3/2"], "--shard is '3/2', it takes K/N"),
        (["dataset", "--dataset_file", "@", "--shard", "9/9"], "--shard 9/9 of 2 prompts has none"),
        (["dataset", "--dataset_file", "@", "--start", "2"], "has 2 prompts, --start is 2"),
        (["merge", "nothing.jsonl", "--output", "x.jsonl"], "nothing.run.json is missing"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    arguments: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = c2c.write_prompts(tmp_path / "p.jsonl", 2)
    output = [] if "--output" in arguments else ["--output", "x.jsonl"]
    refused(call("bench", "c2c", *[str(given) if word == "@" else word for word in arguments], *output), wanted)
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    wanted = r"--dataset needs the datasets library.*pip install .* -e '\.\[datasets\]', or give --dataset_file"
    refused(call("bench", "c2c", "dataset", "--dataset", "some/set"), wanted)


def test_analyze_refuses_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": 0}\n')
    refused(call("bench", "analyze", str(path)), "line 1 is no record of `bench c2c`: prompt Field required")
    path.write_text('{"id": 0')
    refused(call("bench", "analyze", str(path)), "there is no whole record")
    refused(call("bench", "analyze", str(tmp_path / "none.jsonl")), "cannot be read")


def test_the_group_starts_light() -> None:
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(loaded_modules("import ktverify.cli.main"))
    reading = "from ktverify.bench.c2c import prompts, store, views"
    assert not {"torch", "transformers"} & set(loaded_modules(reading))


@pytest.mark.parametrize(
    "command", [["c2c", "single"], ["c2c", "batch"], ["c2c", "dataset"], ["c2c", "merge"], ["analyze"]]
)
def test_every_command_shows_an_example(command: list[str]) -> None:
    assert f"python -m ktverify bench {' '.join(command)}" in ends(call("bench", *command, "--help"), 0)
