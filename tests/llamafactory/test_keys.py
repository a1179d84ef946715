"""The engine's keys in LLaMA-Factory's configurations: taken out, checked, refused. Needs no LLaMA-Factory."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ktverify.errors import WrongKeys
from ktverify.llamafactory import stock
from ktverify.llamafactory.keys import read_configuration, split_keys
from ktverify.system.files import ROOT
from tests.support.command_line import call, refused

CONFIGURATIONS = sorted((ROOT / "tests" / "documents" / "configurations").glob("*.yaml"))
BASE: dict[str, Any] = {"model_name_or_path": "x", "stage": "sft", "finetuning_type": "lora", "use_kt": True}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_documents_configurations_are_taken_as_they_are(path: Path) -> None:
    given = read_configuration(path, ["--kt_num_threads", "80", "output_dir=saves/test-run"])
    split = split_keys(given, trains=True)
    assert split.engine.use_kt
    assert split.engine.kt_num_threads == 80
    assert split.engine.tp == (given.get("kt_tp_count", 1) if given.get("kt_tp_enabled") else 1)
    assert split.arguments["output_dir"] == "saves/test-run"
    assert split.arguments["do_train"] is True
    assert split.arguments["template"] in ("deepseek", "deepseek3")
    assert not [name for name in split.arguments if name.startswith(("kt_", "use_kt")) or name == "torch_dtype"]
    assert split.dtype == given.get("torch_dtype")
    assert split.arguments["logging_nan_inf_filter"] is False
    assert split.arguments.keys() - {"do_train", "logging_nan_inf_filter"} == {
        name for name in given if not name.startswith(("kt_", "use_kt")) and name != "torch_dtype"
    }


def test_the_engines_keys_may_be_nested_or_have_other_programs_names() -> None:
    nested = {"kt_config": {"backend": "AMXBF16", "kt_num_threads": 3, "tp_enabled": True, "tp_count": 2}}
    engine = split_keys({**BASE, **nested}, trains=True).engine
    assert (engine.kt_backend, engine.kt_num_threads, engine.tp) == ("AMXBF16", 3, 2)
    other = split_keys({**BASE, "cpu_infer": 5, "kt_threadpool_count": 4, "kt_tp_enabled": True}, trains=True)
    assert (other.engine.kt_num_threads, other.engine.tp) == (5, 4)
    assert len(other.notes) == 2


def test_without_the_engine_every_key_is_llamafactorys() -> None:
    given = {"stage": "ppo", "finetuning_type": "full", "deepspeed": "ds.json", "do_eval": True}
    split = split_keys(given, trains=True)
    assert not split.engine.use_kt
    assert split.arguments == given
    assert not split.compares
    assert split_keys({**BASE, "use_kt": False}, trains=True).compares
    assert not split_keys({**BASE, "export_dir": "out"}, trains=False).engine.use_kt


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("PLACE", "/p")
    monkeypatch.delenv("NOWHERE", raising=False)
    given = {
        "model_name_or_path": "~/m",
        "output_dir": "$PLACE/out",
        "adapter_name_or_path": "~/a,${PLACE}/b",
        "dataset_dir": "~",
        "export_dir": "saves/$PLACE",
        "resume_from_checkpoint": True,
        "dataset": "~not_a_path",
    }
    found = split_keys({**BASE, "use_kt": False, **given}, trains=True).arguments
    wanted = ["/h/m", "/p/out", "/h/a,/p/b", "/h", "saves//p", True, "~not_a_path"]
    assert [found[name] for name in given] == wanted
    with pytest.raises(WrongKeys) as caught:
        split_keys({**BASE, "output_dir": "$NOWHERE/x", "export_dir": "~nobody_here/x"}, trains=True)
    assert len(caught.value.lines) == 2
    assert "output_dir got '$NOWHERE/x'" in caught.value.lines[0]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"kt_bakend": "AMXBF16"}, "unknown key 'kt_bakend'; did you mean kt_backend"),
        ({"kt_num_threads": 0}, "kt_num_threads got 0: .*greater than or equal to 1"),
        ({"kt_num_threads": True}, "kt_num_threads got True: true and false are not what it takes"),
        ({"kt_num_gpu_experts": -1}, "kt_num_gpu_experts got -1: Input should be greater than or equal to 0"),
        ({"kt_weight_path": 3}, "kt_weight_path got 3: "),
        ({"kt_expert_checkpoint_path": "/w"}, "kt_expert_checkpoint_path got '/w': kt_weight_path names"),
        ({"kt_config": 3}, "kt_config got 3; it takes keys and values"),
        ({"kt_config": {"num_threads": 3}, "kt_num_threads": 4}, "kt_num_threads 4 and kt_config.num_threads 3 are"),
        ({"stage": "ppo"}, "stage got 'ppo'; with use_kt: true it takes sft, dpo, kto, rm, pt"),
        ({"finetuning_type": "full"}, "finetuning_type got 'full'; with use_kt: true it takes lora"),
        ({"quantization_bit": 4}, "quantization_bit got 4: the weights are"),
        ({"deepspeed": "ds.json"}, "deepspeed got 'ds.json': a training is one process"),
        ({"adapter_name_or_path": "a,b"}, "adapter_name_or_path got 'a,b'; with use_kt: true it takes one adapter"),
        ({"torch_dtype": "float8"}, "torch_dtype got 'float8'; it takes"),
        ({"do_train": False}, "there is nothing to do"),
        ({"do_predict": True}, "do_predict got True: nothing is predicted"),
        ({"predict_with_generate": True}, "predict_with_generate got True: nothing is predicted"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(WrongKeys, match=text) as raised:
        split_keys({**BASE, **keys}, trains=True)
    assert len(raised.value.lines) == 1


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"use_kt: true\nkt_tp_count: none\noutput_dir: {tmp_path}/out\n")
    refused(call("llamafactory", "train", file), "kt_tp_count got 'none'")
    refused(call("llamafactory", "train", file, "more"), "'more' stands where a --key is expected")
    refused(call("llamafactory", "train", tmp_path / "no.yaml"), "there is no configuration .*no.yaml")
    refused(call("llamafactory", "eval", file), "llamafactory takes train, export, chat, not 'eval'")
    assert list(tmp_path.iterdir()) == [file]


def test_a_fork_is_refused_and_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        return "5.6.0.post6" if name == "transformers-kt" else real(name)

    file = tmp_path / "c.yaml"
    file.write_text(f"use_kt: true\nmodel_name_or_path: x\noutput_dir: {tmp_path}/out\n")
    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", version)
        fork = r"transformers-kt 5\.6\.0\.post6 is installed in the place of transformers"
        with pytest.raises(ImportError, match=f"^{fork}"):
            stock.require_stock()
        refused(call("llamafactory", "train", file), fork)
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^llamafactory is not installed for .*make llamafactory"):
        stock.require_stock()


def test_another_form_of_llamafactory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: Any) -> Any:
        return model

    loader = ModuleType("llamafactory.model.loader")
    loader.init_adapter = other  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, loader.__name__, loader)
    monkeypatch.setattr(stock, "require_stock", lambda: None)
    monkeypatch.setattr(stock, "_import_without_torchaudio", lambda: None)
    with pytest.raises(ImportError, match=r"has another init_adapter than 0\.9\.5"):
        stock.connect()
