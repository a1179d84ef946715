"""Configurations, data and commands: every refusal is one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from ktverify.training import init_cpu_infer
from ktverify.training.config import read_config
from ktverify.training.dataset import EXAMPLE, IGNORED, Exchange, encode, example_data, read_records
from ktverify.training.pretrained import quiet
from ktverify.training.tiny import make_tiny, make_tokenizer
from tests.support.command_line import call, ends, refused

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MINIMAL = "model_name_or_path: nowhere\ndataset: alpaca_tiny\noutput_dir: out\n"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """A configuration file of MINIMAL and further lines, in tmp_path."""

    def write(*lines: str, text: str = MINIMAL) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text.replace("output_dir: out", f"output_dir: {tmp_path / 'out'}") + "\n".join(lines))
        return path

    return write


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("lora_rnak: 8", r"^error: \S+/config\.yaml: unknown key 'lora_rnak'; did you mean lora_rank\?$"),
        ("lora_rank: eight", "lora_rank got 'eight'"),
        ("lora_rank: 0", "lora_rank got 0"),
        ("stage: ppo", "stage got 'ppo'"),
        ("lora_rank: true", "lora_rank got True: true and false are not what it takes"),
        ("warmup_ratio: 1.0", "warmup_ratio got 1.0: Input should be less than 1"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type is 'cosin', it takes one of linear, cosine,"),
        ("kt_weight_path: 7", "kt_weight_path got 7: "),
        ("kt_num_gpu_experts: -1", "kt_num_gpu_experts got -1: Input should be greater than or equal to 0"),
        ("kt_gpu_experts_mask: nothing.json", "kt_gpu_experts_mask 'nothing.json' is no file; python -m ktverify"),
        ("kt_use_wrapper: false", "kt_use_wrapper got False: the engine has no other way in; it takes true"),
        ("kt_weight_path: /nowhere", "kt_weight_path is '/nowhere'; it takes a safetensors file or a folder of them"),
        ("kt_backend: CUDA", "kt_backend is 'CUDA', which is unknown; it takes AMXBF16"),
        ("dataset: nothing.json", "dataset 'nothing.json' is no file"),
        ("resume_from_checkpoint: true", "holds no checkpoint to resume from"),
        ("- a list", "is no YAML"),
        ("", "model_name_or_path 'nowhere' is no directory"),
    ],
)
def test_a_wrong_configuration_is_refused(line: str, wanted: str, config: Callable[..., Path]) -> None:
    text = MINIMAL.replace("dataset: alpaca_tiny\n", "") if line.startswith("dataset") else MINIMAL
    refused(call("train", config(line, text=text)), wanted)


def test_several_gpus_are_refused(config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    refused(call("train", config()), "2 GPUs are visible, a training takes one: choose it by CUDA_VISIBLE_DEVICES")


def test_one_of_several_processes_is_refused_before_anything_is_read(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("train", "memory", "throughput"):
        refused(call(command, config()), "this is one of 2 processes, a training takes one")


def test_missing_keys_and_files(config: Callable[..., Path], tmp_path: Path) -> None:
    refused(call("train", tmp_path / "nothing.yaml"), "there is no configuration")
    # what help names, from another folder than a clone
    example = tmp_path / "examples" / "minimal.yaml"
    refused(call("train", example), rf"there is no configuration {example}; an example is \S+/examples/minimal\.yaml")
    refused(call("train", config(text="# nothing yet\n")), r"config\.yaml holds nothing; it takes keys and values")
    refused(call("train", config(text="dataset: alpaca_tiny\noutput_dir: out\n")), "model_name_or_path got nothing")
    refused(call("train", config(), "--max_steps"), "--max_steps has no value")
    refused(call("train", config(), "--max_stps", "3"), "did you mean max_steps?")


@pytest.mark.parametrize("written", ["{base}", "{base}/", "{base}/../base", "{link}"])
def test_a_model_is_not_trained_into_its_own_directory(written: str, tmp_path: Path) -> None:
    base, link, path = tmp_path / "base", tmp_path / "link", tmp_path / "a.yaml"
    base.mkdir()
    (base / "tokenizer.json").write_text("mine")
    link.symlink_to(base)
    for option in ("", "overwrite_output_dir: true\n"):
        output = written.format(base=base, link=link)
        path.write_text(f"model_name_or_path: {base}\ndataset: alpaca_tiny\noutput_dir: {output}\n{option}")
        refused(call("train", path), "is the model's own directory: name another")
    assert [file.read_text() for file in base.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("line", "wanted"), [("", "exists and is not empty"), ("overwrite_output_dir: true", "is no directory")]
)
def test_a_refused_training_leaves_what_is_there(
    line: str, wanted: str, config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "out" / "loss.jsonl").write_text("")
    refused(call("train", config(line)), wanted)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-5", "loss.jsonl"}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("empty.json", "", "holds no record"),
        ("empty.jsonl", "\n", "holds no record"),
        ("list.json", "[]", "holds no record"),
        ("torn.json", '[{"instruction": ', "is no JSON"),
        ("other.json", '{"instruction": "a"}', "line 1 has instruction; it takes"),
        ("chat.json", '[{"messages": []}]', "record 1, messages has nothing; it takes user and"),
        ("history.jsonl", '{"instruction": "a", "output": "b", "history": [["c"]]}', "line 1: history has"),
        ("line.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instruction', "line.jsonl, line 3 is no JSON"),
        ("number.jsonl", '{"instruction": "a", "output": 3}', "output is a int, it takes text"),
    ],
)
def test_wrong_data_is_refused(name: str, text: str, wanted: str, config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    # the path is also looked for beside the configuration
    path = config(text=MINIMAL.replace(EXAMPLE, name))
    refused(call("train", path), wanted)


def test_what_a_configuration_means(config: Callable[..., Path]) -> None:
    found = read_config(config("lora_rank: 4"), ["--lora_rank", "16", "--learning-rate=1e-3", "--use_kt", "false"])
    assert (found.lora_rank, found.learning_rate, found.use_kt) == (16, 1e-3, False)
    assert read_config(config("kt_tp_count: 2")).tp == 1
    assert read_config(config("kt_tp_count: 2", "kt_tp_enabled: true")).tp == 2
    assert read_config(config("template: deepseek")).template_note.startswith("template 'deepseek' is not looked up")
    assert read_config(config("template: default")).template_note == ""


def test_labels_are_on_the_answer_only() -> None:
    tokenizer = make_tokenizer()
    records = read_records(example_data())
    rows = encode(records, tokenizer, 512)
    assert len(rows) == len(records)
    for record, row in zip(records, rows, strict=True):
        answer = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert answer == f"{record.answer}</s>"
        asked = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
        assert record.prompt in tokenizer.decode(asked)
    assert encode(records, tokenizer, 512, workers=3) == rows
    cut = encode(records, tokenizer, 40)
    assert all(len(row["input_ids"]) <= 40 for row in cut)
    with pytest.raises(ValueError, match="cutoff_len 3 leaves nothing of any answer"):
        encode(records, tokenizer, 3)


class Spoken:
    """A tokenizer of single characters, whose template drops what was thought in earlier turns."""

    chat_template = "yes"

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        text = ""
        for number, message in enumerate(messages, start=1):
            content = message["content"]
            if message["role"] == "assistant" and number < len(messages):
                content = content.rpartition(")")[2]
            if content == "refused":
                raise TemplateError("System role not supported")
            text += f"[{message['role'][0]}]{content}."
        return text + ("[a]" if add_generation_prompt else "")

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_labels_are_on_every_answer_of_a_conversation() -> None:
    record = Exchange("how?", "(hm) so", "be kind", (("who?", "(hm) me"), ("why?", " ")))
    row = encode([record], Spoken(), 512)[0]
    whole = "".join(map(chr, row["input_ids"]))
    assert whole == "[s]be kind.[u]who?.[a] me.[u]why?.[a] .[u]how?.[a](hm) so."
    labels = [chr(label) if label != IGNORED else "_" for label in row["labels"]]
    # an answer that the template changes later, and an empty one, have no labels
    assert "".join(labels).replace("_", "") == "(hm) so."
    plain = Exchange("how?", "so", "be kind", (("who?", "me"), ("why?", "")))
    row = encode([plain], Spoken(), 512)[0]
    whole = "".join(map(chr, row["input_ids"]))
    labels = [chr(label) if label != IGNORED else "_" for label in row["labels"]]
    assert "".join(labels).strip("_") == "me." + "_" * (whole.index("so.") - whole.index("me.") - 3) + "so."


def test_empty_answers_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    records = [Exchange("a", "b", where="f, record 1"), Exchange("a", " ", where="f, record 2")]
    assert len(encode(records, make_tokenizer(), 24)) == 1
    wanted = "1 of 2 records are left out: their answers are empty; the first is f, record 2\n"
    assert capsys.readouterr().err == wanted
    with pytest.raises(ValueError, match="no record has an answer: all 1 are empty"):
        encode(records[1:], make_tokenizer(), 24)


def test_a_template_that_refuses_a_record_is_reported_with_it() -> None:
    records = [Exchange("a", "b", where="f, record 1"), Exchange("a", "b", "refused", where="f, record 2")]
    with pytest.raises(ValueError, match=r"^f, record 2: the tokenizer's chat template refuses it: .*System role not"):
        encode(records, Spoken(), 24)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--learning_rate", "inf"], "learning_rate got 'inf': Input should be a finite number"),
        (["--learning_rate=.nan"], "learning_rate got nan: Input should be a finite number"),
        (["--lora_rank", ".inf"], "lora_rank got inf: Input should be a finite number"),
        (["--lora_target", "*"], r"--lora_target \* is no YAML"),
        (["--dataset", "[a"], r"--dataset \[a is no YAML"),
    ],
)
def test_values_that_are_no_values(words: list[str], wanted: str, config: Callable[..., Path]) -> None:
    refused(call("train", config(), *words), wanted)


def test_records_without_labels_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    records = [Exchange("a", "b"), Exchange("a " * 50, "b")]
    assert len(encode(records, make_tokenizer(), 24)) == 1
    assert capsys.readouterr().err.startswith("1 of 2 records are left out: cutoff_len 24 leaves nothing of")


def test_a_line_separator_in_a_text_is_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "a\u2028b", "output": "c"}\r\n', encoding="utf-8")
    assert read_records(path) == [Exchange("a\u2028b", "c")]


def test_make_tiny_refuses_unknown_families_and_used_directories(tmp_path: Path) -> None:
    refused(call("make-tiny", "deepseekv3", "--out", tmp_path / "a"), "did you mean deepseek_v3?")
    assert not (tmp_path / "a").exists()
    (tmp_path / "precious").write_text("")
    refused(call("make-tiny", "mixtral", "--out", tmp_path), "exists and is not empty")
    ends(call("make-tiny", "mixtral", "--out", tmp_path / "b"), 0)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "mixtral"


def test_make_tiny_leaves_nothing_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_tiny("mixtral", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match=r"^training needs no_such_module: pip install -c .*\[training\]"):
        quiet("training", "no_such_module")


@pytest.mark.parametrize(("factor", "code"), [(1.04, 0), (1.06, 1)])
def test_compare_curves(factor: float, code: int, tmp_path: Path) -> None:
    def write(name: str, by: float) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"step": s, "loss": by * (5 - s / 10)}) + "\n" for s in range(1, 11)))
        return path

    drawn = tmp_path / "curves.png"
    text = ends(call("compare-curves", write("old", 1.0), write("new", factor), "--plot", drawn), code)
    assert text.splitlines()[-1].startswith("PASS" if code == 0 else "FAIL")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    refused(call("compare-curves", tmp_path / "nothing", tmp_path / "new.jsonl"), "has no loss history")


@pytest.mark.parametrize("name", ["threads", "threadpool_count", "max_cache_depth", "chunked_prefill_size"])
def test_settings_of_the_engine_are_counts(name: str) -> None:
    rows: list[tuple[Any, type[Exception]]] = []
    mixed: tuple[Any, ...] = ("2", True, 2.0, [], math.nan)
    rows += [(value, TypeError) for value in mixed]
    rows += [(value, ValueError) for value in (0, -1, 10**400, 10**5000)]
    for value, kind in rows:
        with pytest.raises(kind, match=f"^{name} is .*it takes an? ") as caught:
            init_cpu_infer(**{name: value})
        assert "\n" not in str(caught.value)


def test_an_unknown_backend_or_instruction_set_is_one_line() -> None:
    rows: dict[str, list[Any]] = {"kt_backend": [[], 7, None, "x"], "isa": [7, [], "", "avx3", "\ud800"]}
    for name, values in rows.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} is .*unknown") as caught:
                init_cpu_infer(**{name.removeprefix("kt_"): value})
            assert "\n" not in str(caught.value)
