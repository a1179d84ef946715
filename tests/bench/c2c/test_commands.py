"""The commands: what they write, what goes on after a kill, what shards merge to; what is refused in one line, and that
help is there at once."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ktverify.bench.c2c import run, store
from ktverify.bench.c2c.models import Side
from ktverify.bench.c2c.prompts import BUILT_IN
from ktverify.bench.c2c.record import C2cSettings, PromptRecord
from ktverify.bench.c2c.views import COLUMNS, LANES, figure, short
from ktverify.training import tokens
from tests.support import c2c
from tests.support.command_line import call, ends, loaded_modules, refused
from tests.support.traces import read_trace

Pair = tuple[Path, Path]
TIMING = {
    "base_embedding_ms", "base_prefill_ms", "teacher_embedding_ms", "teacher_prefill_ms", "projector_total_ms",
    "projector_avg_ms", "projector_calls", "decode_total_ms", "decode_avg_ms", "num_generated_tokens",
    "tokens_per_second", "decode_step_times_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of seven prompts, made in one run."""
    folder = tmp_path_factory.mktemp("whole")
    given = c2c.write_prompts(folder / "prompts.jsonl", 7)
    ends(call(*dataset(pair, folder / "whole.jsonl", given)), 0)
    return folder / "whole.jsonl"


def table(path: Path, delimiter: str = "\t") -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


def cut(whole: Path, path: Path, first: int, last: int, **settings: object) -> Path:
    """The records of `whole` from `first` to before `last`, with other settings, at `path`; for time's sake."""
    info = store.read_info(whole)
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[first:last]))
    store.write_info(path, info.settings.model_copy(update=settings), info.sittings)
    return path


def dataset(pair: Pair, output: Path, given: Path, *more: str) -> list[str]:
    return ["bench", "c2c", "dataset", "--dataset_file", str(given), *c2c.options(pair, output), *more]


# ---- what is written


def test_single_writes_every_view(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "one.jsonl"
    given = c2c.options(pair, output)
    given[-1] = "2"  # warm-ups
    text = ends(call("bench", "c2c", "single", BUILT_IN[0], *given, "--profile_tokens", "2"), 0)
    (record,) = c2c.lines(output)
    assert set(record) == {"id", "prompt", "response", "model_config", "timing"}
    assert record["model_config"] == {"base_model": str(pair[0]), "teacher_model": str(pair[1])}
    timing: Any = record["timing"]
    assert set(timing) == TIMING
    assert (record["prompt"], timing["num_generated_tokens"]) == (BUILT_IN[0], 3)
    assert "3 tokens in " in text.splitlines()[0]
    (sitting,) = store.read_info(output).sittings
    assert len(sitting.warmup_ms) == 2
    assert sitting.others is not None
    assert 0 <= sitting.others <= 1
    assert sitting.machine.cpu
    assert sitting.machine.versions["torch"]
    rows = table(tmp_path / "one.operators.tsv")
    assert "aten::mm" in {row["operator"] for row in rows}
    assert not LANES.keys() & {row["operator"] for row in rows}
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.01)
    own = [float(row["self_ms"]) for row in rows]
    assert own == sorted(own, reverse=True)
    traced = json.loads((tmp_path / "one.operators.trace.json").read_text())["traceEvents"]
    assert LANES.keys() <= {event["name"] for event in traced}
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    check_trace((tmp_path / "one.trace.json").read_text(), timing)
    refused(call("bench", "c2c", "single", *given), "one.jsonl exists: remove it or name another --output")


def test_projectors_of_a_file_are_used_and_named(pair: Pair, sides: tuple[Side, Side], tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    c2c.pipeline(*sides, teaching=True).projectors.save(file)
    single = ("bench", "c2c", "single", BUILT_IN[0], "--profile_tokens", "0")
    ends(call(*single, *c2c.options(pair, tmp_path / "plain.jsonl")), 0)
    ends(call(*single, *c2c.options(pair, tmp_path / "taught.jsonl"), "--projectors", str(file)), 0)
    plain, taught = (store.read_records(tmp_path / name)[0] for name in ("plain.jsonl", "taught.jsonl"))
    assert plain.response != taught.response
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert store.read_info(tmp_path / "taught.jsonl").settings.projectors == f"mine.safetensors {digest}"
    assert not (tmp_path / "plain.operators.tsv").exists()


def check_trace(text: str, timing: dict[str, Any]) -> None:
    """A named lane for each event, one call after the other, and the times of the record."""
    named, calls = read_trace(text)
    assert list(named.values()) == list(dict.fromkeys(LANES.values()))
    assert all(named[event["tid"]] == LANES[event["name"]] for event in calls)
    assert all(before["ts"] + before["dur"] <= event["ts"] for before, event in itertools.pairwise(calls))
    for stage, field in (("decode_step", "decode_total_ms"), ("projector", "projector_total_ms")):
        assert sum(e["dur"] for e in calls if e["name"] == stage) / 1e3 == pytest.approx(timing[field])


def test_batch_and_what_analyze_makes_of_it(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "five.jsonl"
    text = ends(call("bench", "c2c", "batch", *c2c.options(pair, output)), 0)
    records = store.read_records(output)
    assert [record.prompt for record in records] == list(BUILT_IN)
    assert all(short(prompt) in text for prompt in BUILT_IN)
    rows = table(tmp_path / "five.tsv")
    shown = ends(call("bench", "analyze", str(output)), 0)
    assert table(tmp_path / "five.analysis.csv", ",") == rows
    for row, record in zip(rows, records, strict=True):
        assert (row["prompt"], row["response"]) == (record.prompt, record.response)
        assert [float(row[name]) for name in COLUMNS] == pytest.approx([getattr(record.timing, n) for n in COLUMNS])
    assert (tmp_path / "five.analysis.png").read_bytes().startswith(b"\x89PNG")
    totals = sorted(record.timing.total_ms for record in records)
    line = next(line for line in shown.splitlines() if line.startswith("total_ms")).split()
    assert line[3:6] == [figure(totals[2]), figure(totals[0]), figure(totals[-1])]
    found = json.loads(ends(call("bench", "analyze", str(output), "--json"), 0))
    assert found["slowest"][0]["total_ms"] == totals[-1]
    assert found["statistics"]["decode_step_times_ms"]["count"] == 15
    assert "## the slowest 5" in (tmp_path / "five.analysis.md").read_text(encoding="utf-8")


def test_the_slowest_ten_are_ten(whole: Path, tmp_path: Path) -> None:
    twice = [str(whole), str(whole)]
    found = json.loads(ends(call("bench", "analyze", *twice, "--out", str(tmp_path), "--json"), 0))
    assert (found["records"], len(found["slowest"])) == (14, 10)
    totals = [row["total_ms"] for row in found["slowest"]]
    assert totals == sorted(totals, reverse=True)


# ---- going on after a kill


def test_a_killed_run_is_resumed_after_the_last_whole_record(pair: Pair, tmp_path: Path) -> None:
    given, output = c2c.write_prompts(tmp_path / "p.jsonl", 40), tmp_path / "t.jsonl"
    command = dataset(pair, output, given)
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "ktverify", *command], **silent)
    try:
        until = time.monotonic() + 120
        while not output.is_file() or output.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait(timeout=30)
    assert process.returncode == -signal.SIGKILL
    before = output.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    done = before.count(b"\n")
    assert 2 <= done < 40
    ends(call(*command), 0)
    assert output.read_bytes().startswith(before)
    assert [record.id for record in store.read_records(output)] == list(range(40))
    assert [sitting.from_id for sitting in store.read_info(output).sittings] == [0, done]
    assert "40 of 40 are there already" in ends(call(*command), 0)


def test_a_torn_line_is_cut_off_wherever_it_was_torn(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    assert any(byte > 127 for byte in content[start:]), "no letter of several bytes to tear"
    path = tmp_path / "torn.jsonl"
    for end in (start, start + 1, *range(start + 5, len(content), 11), len(content) - 2, len(content) - 1):
        path.write_bytes(content[:end])
        # a line that lacks its line break alone can be read; it is measured again all the same
        assert len(store.read_records(path)) == (7 if end == len(content) - 1 else 6)
        file = store.RecordFile(path)
        file.close()
        assert len(file.done) == 6
        assert path.read_bytes() == content[:start]


def test_a_torn_file_is_finished_and_equals_the_whole(pair: Pair, whole: Path, tmp_path: Path) -> None:
    output = cut(whole, tmp_path / "whole.jsonl", 0, 7)
    os.truncate(output, output.stat().st_size - 30)
    ends(call(*dataset(pair, output, whole.parent / "prompts.jsonl")), 0)
    assert c2c.without_times(output) == c2c.without_times(whole)


def test_ctrl_c_leaves_whole_records(pair: Pair, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_prompt = run.time_prompt

    def interrupted(pipeline: Any, settings: C2cSettings, number: int, prompt: str) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return time_prompt(pipeline, settings, number, prompt)

    monkeypatch.setattr(run, "time_prompt", interrupted)
    command = dataset(pair, tmp_path / "t.jsonl", whole.parent / "prompts.jsonl")
    stopped = call(*command)
    ends(stopped, 130)
    assert "stopped after 2 of 7; the same command with --output" in stopped.stderr
    assert [record.id for record in store.read_records(tmp_path / "t.jsonl")] == [0, 1]
    assert [row["id"] for row in table(tmp_path / "t.tsv")] == ["0", "1"]
    monkeypatch.undo()
    ends(call(*command), 0)
    assert c2c.without_times(tmp_path / "t.jsonl") == c2c.without_times(whole)


def test_a_file_of_another_run_is_not_continued(pair: Pair, whole: Path, tmp_path: Path) -> None:
    content, given = whole.read_bytes(), whole.parent / "prompts.jsonl"
    other = call(*dataset(pair, whole, given, "--max_new_tokens", "4"))
    refused(other, "other settings .max_new_tokens 3 and 4.; name")
    refused(call(*dataset(pair, whole, given, "--num_samples", "3")), "count 7 and 3")
    # nor one of other prompts
    first, second, *others = given.read_bytes().splitlines(keepends=True)
    swapped = tmp_path / "prompts.jsonl"
    swapped.write_bytes(b"".join([second, first, *others]))
    refused(call(*dataset(pair, whole, swapped)), "the record of id 0 is not of prompt 0 of this data set")
    # nor one that another process writes
    with contextlib.closing(store.RecordFile(whole)):
        refused(call(*dataset(pair, whole, given)), "is being written by another run")
    assert whole.read_bytes() == content


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenized(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "short"}) + "\n" + json.dumps({"prompt": "long words " * 2_000_000}) + "\n")
    characters: list[int] = []
    tokenized = tokens._tokenized

    def counted(text: str, tokenizer: Any) -> list[int]:
        characters.append(len(text))
        return tokenized(text, tokenizer)

    monkeypatch.setattr(tokens, "_tokenized", counted)
    done = call(*dataset(pair, tmp_path / "t.jsonl", path))
    refused(done, r"prompt 1 has more than the 512 tokens that .* takes; make it shorter")
    assert 0 < sum(characters) < 200_000
    assert not (tmp_path / "t.jsonl").exists()


def test_a_full_disk_leaves_whole_records(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = store.read_records(whole)
    file = store.RecordFile(tmp_path / "t.jsonl")
    file.write(first)
    write, room = os.write, [50, 0]

    def full(descriptor: int, data: bytes) -> int:
        if left := room.pop(0):
            return write(descriptor, data[:left])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"t\.jsonl cannot be written: No space left on device"):
            file.write(second)
    file.write(second)
    file.close()
    assert store.read_records(tmp_path / "t.jsonl") == [first, second]


# ---- shards


def test_merged_shards_equal_one_run(pair: Pair, whole: Path, tmp_path: Path) -> None:
    given = whole.parent / "prompts.jsonl"
    parts = [tmp_path / f"part{number}.jsonl" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        ends(call(*dataset(pair, part, given, "--shard", f"{number}/2")), 0)
    joined = tmp_path / "joined.jsonl"
    ends(call("bench", "c2c", "merge", str(parts[1]), str(parts[0]), "--output", str(joined)), 0)
    assert c2c.without_times(joined) == c2c.without_times(whole)
    assert store.read_info(joined).settings == store.read_info(whole).settings
    assert len(store.read_info(joined).sittings) == 2

    def merge(*files: Path, output: Path = tmp_path / "no.jsonl") -> Any:
        return call("bench", "c2c", "merge", *map(str, files), "--output", str(output))

    one, two = parts
    refused(merge(one, two, output=joined), "joined.jsonl exists")
    refused(merge(one), "3 of 7 ids are in no file: 1, 3, 5; finish those shards or name them too")
    refused(merge(one, two, one), r"part1\.jsonl: id 0 is in another of the files as well")
    short_of_one = tmp_path / "unfinished.jsonl"
    refused(merge(one, cut(two, short_of_one, 0, 2)), "1 of 7 ids are in no file: 5")
    other = cut(two, short_of_one, 0, 2, dtype="float32")
    refused(merge(one, other), "are not of one run: dtype bfloat16 and float32")
    assert not (tmp_path / "no.jsonl").exists()


def test_other_load_is_the_first_note(whole: Path, tmp_path: Path) -> None:
    info, path = store.read_info(whole), tmp_path / "busy.jsonl"
    (sitting,) = info.sittings

    def notes(*others: float | None) -> list[str]:
        store.write_info(path, info.settings, [sitting.model_copy(update={"others": share}) for share in others])
        return store.notes([path])

    (about,) = notes(None, 0.01)
    assert "taught by" in about
    busy = "other programs had up to 42 % of the processors: these times mean little"
    assert notes(0.01, 0.42, None) == [busy, about]


def test_ranges_merge_as_shards_do(whole: Path, tmp_path: Path) -> None:
    """--start 0 --num_samples 3 and --start 3."""
    first = cut(whole, tmp_path / "a.jsonl", 0, 3, start=0, count=3)
    second = cut(whole, tmp_path / "b.jsonl", 3, 7, start=3, count=4)
    assert store.merge([second, first], tmp_path / "joined.jsonl") == store.read_records(whole)
    assert store.read_info(tmp_path / "joined.jsonl").settings == store.read_info(whole).settings


def test_the_last_shard_is_missed(whole: Path, tmp_path: Path) -> None:
    """Three prompts in three shards: the ids of the first two leave no gap."""
    parts = [cut(whole, tmp_path / f"{k}.jsonl", k - 1, k, count=3, shard=(k, 3)) for k in (1, 2)]
    with pytest.raises(ValueError, match="1 of 3 ids are in no file: 2; finish those shards"):
        store.merge(parts, tmp_path / "joined.jsonl")


def test_shards_share_all_ids(whole: Path) -> None:
    settings = store.read_info(whole).settings.model_copy(update={"start": 5, "count": 11})
    ids = [settings.model_copy(update={"shard": (number, 3)}).ids for number in (1, 2, 3)]
    assert sorted(number for part in ids for number in part) == list(range(5, 16)) == list(settings.ids)


def test_a_record_is_written_as_it_is_read(whole: Path) -> None:
    for line, record in zip(whole.read_bytes().splitlines(), store.read_records(whole), strict=True):
        assert record.model_dump_json().encode() == line
        assert PromptRecord.model_validate_json(line) == record


# ---- refusals, and a light start


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


def test_analyze_refuses_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": 0}\n')
    refused(call("bench", "analyze", str(path)), "line 1 cannot be read: prompt Field required")
    path.write_text('{"id": 0')
    text = ends(call("bench", "analyze", str(path)), 2)
    assert "line 1 was cut off while it was written" in text
    assert "error: " in text
    assert "there is no whole record" in text
    refused(call("bench", "analyze", str(tmp_path / "none.jsonl")), "cannot be read")


def test_the_group_starts_light() -> None:
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(loaded_modules("import ktverify.cli.main"))
    assert not {"torch", "transformers"} & set(loaded_modules("from ktverify.bench.c2c import prompts, store, views"))


@pytest.mark.parametrize(
    "command", [["c2c", "single"], ["c2c", "batch"], ["c2c", "dataset"], ["c2c", "merge"], ["analyze"]]
)
def test_every_command_shows_an_example(command: list[str]) -> None:
    assert f"python -m ktverify bench {' '.join(command)}" in ends(call("bench", *command, "--help"), 0)
