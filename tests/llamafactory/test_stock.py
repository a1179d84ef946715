"""Whole trainings by stock LLaMA-Factory with the experts in the engine. Run by `make llamafactory-test`."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ktverify.cli.main import app
from ktverify.llamafactory import stock
from ktverify.system.files import ROOT
from ktverify.training import load_adapter
from ktverify.training.dataset import example_data
from ktverify.training.pretrained import load_model
from ktverify.training.tiny import make_tiny
from tests.support.checkpoints import FP8, in_fp8, tensors_of, written
from tests.support.models import token_ids

if importlib.util.find_spec("llamafactory") is None:
    pytest.skip(
        "llamafactory is not installed here; `make llamafactory-test` makes its environment and runs these tests in it",
        allow_module_level=True,
    )

pytestmark = pytest.mark.filterwarnings("default")
DOCUMENTS = ROOT / "tests" / "documents" / "configurations"
FAMILIES = ("deepseek_v2", "qwen3_moe")
STEPS, HALF = 100, 50
ANSWER = {"prompt": "instruction", "query": "input", "response": "output"}
# the documents' learning rate is for real models, and the experts of tiny ones have few columns to split
TINY = {"learning_rate": 5e-3, "kt_num_threads": 1, "logging_steps": 1, "gradient_accumulation_steps": 1}


class Place:
    """A folder with tiny models and data sets of every stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {family: make_tiny(family, folder / family) for family in FAMILIES}
        self.data = folder / "data"
        self.data.mkdir()
        records = json.loads(example_data().read_text(encoding="utf-8"))[:24]
        answers = [record["output"] for record in records]
        worse = [*answers[1:], answers[0]]
        ranking = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
        self.write("alpaca_tiny", json.loads(example_data().read_text(encoding="utf-8")), {})
        pairs = [
            {**record, "chosen": record["output"], "rejected": bad} for record, bad in zip(records, worse, strict=True)
        ]
        self.write("pairs", pairs, {"ranking": True, "columns": ranking})
        tagged = [{**record, "tag": number % 2 == 0} for number, record in enumerate(records)]
        self.write("tagged", tagged, {"columns": {**ANSWER, "kto_tag": "tag"}})
        self.write("texts", [{"text": text} for text in answers], {"columns": {"prompt": "text"}})

    def write(self, name: str, records: list[dict[str, Any]], about: dict[str, Any]) -> None:
        (self.data / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
        file = self.data / "dataset_info.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        known[name] = {"file_name": f"{name}.json", **about}
        file.write_text(json.dumps(known), encoding="utf-8")

    def run(self, configuration: str, family: str, output: Path, **keys: Any) -> int:
        """The exit code. Not by CliRunner, whose streams end with a call, while LLaMA-Factory's log keeps the first."""
        chosen = {
            "model_name_or_path": self.models[family],
            "dataset": "alpaca_tiny",
            "dataset_dir": self.data,
            "output_dir": output,
            **TINY,
            **keys,
        }
        words = [f"{name}={value}" for name, value in chosen.items()]
        command = ["llamafactory", "train", str(DOCUMENTS / f"{configuration}.yaml"), *words]
        return app(command, standalone_mode=False) or 0

    def train(self, configuration: str, family: str, output: Path, **keys: Any) -> list[float]:
        assert self.run(configuration, family, output, **keys) == 0
        return losses(output)


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    stock.connect()  # before a test imports a part of LLaMA-Factory
    return Place(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("configuration", ["minimal", "full", "no_tp", "tp"])
def test_training_halves_the_loss_as_stock_does_and_resumes(
    place: Place, tmp_path: Path, configuration: str, family: str
) -> None:
    # in float32 all but the experts: two trainings in bf16 drift apart by their rounding, with any experts
    keys = {"max_steps": STEPS, "save_steps": HALF, "per_device_train_batch_size": 8, "torch_dtype": "float32"}
    keys |= {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    found = place.train(configuration, family, tmp_path / "engine", **keys)
    assert len(found) == STEPS
    assert mean(found[-10:]) < found[0] / 2
    stock = place.train(configuration, family, tmp_path / "stock", **keys, use_kt="false")
    assert max(abs(a - b) / b for a, b in zip(found, stock, strict=True)) < 0.05
    adapter, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("engine", "stock"))
    assert {name: tensor.shape for name, tensor in adapter.items()} == {k: t.shape for k, t in other.items()}
    again = tmp_path / "resumed"
    shutil.copytree(tmp_path / "engine" / f"checkpoint-{HALF}", again / f"checkpoint-{HALF}")
    resumed = place.train(configuration, family, again, **keys, resume_from_checkpoint=again / f"checkpoint-{HALF}")
    assert resumed == found
    same = load_file(again / "adapter_model.safetensors")
    assert all(torch.equal(tensor, same[name]) for name, tensor in adapter.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documents_configuration_of_the_wrapper_trains(place: Place, tmp_path: Path, family: str) -> None:
    found = place.train("wrapper", family, tmp_path / "out", max_steps=20, per_device_train_batch_size=4)
    assert len(found) == 20
    assert mean(found[-5:]) < 0.85 * found[0]
    moved = [
        name
        for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
        if "experts" in name and "lora_B" in name and tensor.abs().max() > 0
    ]
    assert moved


@pytest.mark.parametrize(("stage", "dataset"), [("dpo", "pairs"), ("kto", "tagged"), ("rm", "pairs"), ("pt", "texts")])
def test_every_other_stage_trains(place: Place, tmp_path: Path, stage: str, dataset: str) -> None:
    # pt joins texts to rows of cutoff_len
    keys = {"stage": stage, "dataset": dataset, "max_steps": 20, "per_device_train_batch_size": 2, "cutoff_len": 64}
    found = place.train("no_tp", "qwen3_moe", tmp_path / "out", **keys)
    assert len(found) == 20
    assert mean(found[-5:]) < found[0]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"dataset": "nothing"}, "Undefined dataset nothing in dataset_info.json"),
        ({"dataset_dir": "nowhere"}, "Cannot open nowhere/dataset_info.json"),
        ({"learning_speed": 1}, "Some keys are not used by the HfArgumentParser: .*learning_speed"),
        (
            {"kt_tp_enabled": "true", "kt_tp_count": 3},
            r"For TP, intermediate_size \(40\) must be a multiple of .* \(3\)",
        ),
        ({"kt_backend": "CUDA"}, "kt_backend is 'CUDA', which is unknown; it takes AMXBF16, "),
        ({"kt_backend": "MXFP4"}, "its weights are not quantised, and method MXFP4_SFT takes mxfp4"),
        ({"kt_weight_path": "nowhere"}, "kt_weight_path is 'nowhere'; it takes a safetensors file or a folder"),
        ({"lora_target": "q_porj"}, "lora_target has 'q_porj', which this model has not; did you mean q_proj"),
        ({"model_name_or_path": "nowhere"}, "model_name_or_path 'nowhere' is no directory"),
        ({"stage": "ppo"}, "stage got 'ppo'; with use_kt: true it takes sft"),
    ],
)
def test_what_does_not_work_is_one_line_before_the_model_is_loaded(
    place: Place,
    tmp_path: Path,
    keys: dict[str, Any],
    text: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("llamafactory.train.sft.workflow.load_model", loaded)
    assert place.run("no_tp", "qwen3_moe", tmp_path / "out", **keys) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(text, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place.train("no_tp", "deepseek_v2", tmp_path / "other", max_steps=1)
    capfd.readouterr()
    keys = {"adapter_name_or_path": tmp_path / "other", "max_steps": 1}
    assert place.run("no_tp", "qwen3_moe", tmp_path / "out", **keys) == 2
    assert re.search(r"error: the adapter in .*other does not fit this base model", capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_trained_further_and_merged(place: Place, tmp_path: Path) -> None:
    first = place.train("no_tp", "qwen3_moe", tmp_path / "first", max_steps=20, per_device_train_batch_size=4)
    keys = {"adapter_name_or_path": tmp_path / "first", "per_device_train_batch_size": 4}
    second = place.train("no_tp", "qwen3_moe", tmp_path / "second", max_steps=5, **keys)
    assert second[0] < 0.85 * first[0]
    merge = tmp_path / "merge.yaml"
    lines: dict[str, object] = {
        "model_name_or_path": place.models["qwen3_moe"],
        "adapter_name_or_path": tmp_path / "second",
    }
    lines |= {"template": "deepseek2", "export_dir": tmp_path / "merged", "use_kt": "true"}
    merge.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    assert (app(["llamafactory", "export", str(merge)], standalone_mode=False) or 0) == 0
    ids = token_ids()
    merged = load_model(str(tmp_path / "merged"), "float32", option="merged")
    stock = load_adapter(load_model(str(place.models["qwen3_moe"]), "float32", option="base"), tmp_path / "second")
    with torch.no_grad():
        difference = (merged(ids).logits - stock(ids).logits).norm() / stock(ids).logits.norm()
    assert difference < 0.02  # the sum is rounded to bf16


def test_a_script_trains_by_llamafactorys_own_functions(place: Place, tmp_path: Path) -> None:
    """The second document's section 5.2: get_train_args with the engine's keys, run_sft, resuming."""
    from ktverify import as_kt_kernel

    as_kt_kernel.install()
    from llamafactory.hparams import get_train_args
    from llamafactory.model.model_utils.kt_moe import MOELayerWrapper
    from llamafactory.train.sft.workflow import run_sft

    keys = {
        "model_name_or_path": str(place.models["deepseek_v2"]),
        "stage": "sft",
        "finetuning_type": "lora",
        "use_kt": True,
        "kt_backend": "AMXBF16",
        "kt_num_threads": 8,
        "lora_rank": 8,
        "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "dataset": "alpaca_tiny",
        "dataset_dir": str(place.data),
        "template": "deepseek2",
        "cutoff_len": 256,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_steps": 5,
        "logging_steps": 1,
        "output_dir": str(tmp_path / "out"),
    }
    names = ("model_args", "data_args", "training_args", "finetuning_args", "generating_args")
    for more in (
        {"max_steps": 10},
        {"max_steps": 20, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-10")},
    ):
        run_sft(**dict(zip(names, get_train_args({**keys, **more}), strict=True)))
        assert (tmp_path / "out" / "trainer_state.json").is_file()
    assert len(losses(tmp_path / "out")) == 20
    assert MOELayerWrapper.__module__ == "ktverify.training.layer"


def test_a_trained_adapter_answers_in_a_chat(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train("no_tp", "qwen3_moe", tmp_path / "adapter", max_steps=30, per_device_train_batch_size=8)
    lines: dict[str, object] = {"model_name_or_path": place.models["qwen3_moe"], "use_kt": "true"}
    lines |= {"adapter_name_or_path": tmp_path / "adapter", "template": "deepseek2"}
    lines |= {"infer_backend": "huggingface", "max_new_tokens": 8, "do_sample": "false"}
    chat = tmp_path / "chat.yaml"
    chat.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    said = iter(["What is the capital of France?", "exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    capfd.readouterr()
    assert (app(["llamafactory", "chat", str(chat)], standalone_mode=False) or 0) == 0
    answer = capfd.readouterr().out.partition("Assistant:")[2].strip()
    assert answer


@pytest.mark.parametrize("backend", ["AMXBF16", "AMXFP8"])
def test_an_fp8_checkpoint_trains_as_its_dequantised_weights(backend: str, place: Place, tmp_path: Path) -> None:
    plain = make_tiny("qwen3_moe", tmp_path / "plain", sizes={"hidden_size": 200, "moe_intermediate_size": 136})
    quantised, dequantised = in_fp8(tensors_of(plain))
    bases = (
        written(plain, tmp_path / "fp8", quantised, files=2, quantization_config=FP8),
        written(plain, tmp_path / "dequantised", dequantised),
    )
    keys = {"max_steps": 3, "per_device_train_batch_size": 2}
    found, wanted = (
        place.train(
            "no_tp", "qwen3_moe", tmp_path / f"out-{base.name}", model_name_or_path=base, kt_backend=each, **keys
        )
        for base, each in zip(bases, (backend, "AMXBF16"), strict=True)
    )
    assert len(found) == 3
    assert found == wanted
    about = json.loads((tmp_path / "out-fp8" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(bases[0])


@pytest.mark.usefixtures("place")
def test_the_documents_log_level_reaches_llamafactorys_own_logger() -> None:
    """The second document's section 7.1."""
    from llamafactory.extras import logging as theirs

    said: list[str] = []
    root, child = logging.getLogger("llamafactory"), theirs.get_logger("llamafactory.model.loader")
    handler, level = logging.Handler(), root.level
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    root.addHandler(handler)
    try:
        child.debug("before")
        root.setLevel(logging.DEBUG)
        child.debug("after")
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
    assert said == ["after"]
