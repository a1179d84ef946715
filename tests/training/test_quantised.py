"""Trainings with the experts as codes, from files in published formats: the steps of bf16 training on their weights."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from ktverify.checks.quantised_files import tensors_of as coded_tensors
from ktverify.checks.quantised_inputs import draw
from ktverify.checks.target import expect
from ktverify.engines.quantised import CodedMatrix
from ktverify.engines.weight_files import StoredMatrix
from ktverify.isolation.child import ChildPool
from ktverify.judge.dequantise import CODINGS, codes_of, weights_of
from ktverify.judge.metrics import compare
from ktverify.spec.cases import Case
from ktverify.training import init_cpu_infer, load_adapter, wrap_moe_layers
from ktverify.training.config import read_config
from ktverify.training.export import export_merged
from ktverify.training.pretrained import load_model, quiet
from ktverify.training.run import Trained, run
from ktverify.training.tiny import make_tiny
from tests.support import models
from tests.support.checkpoints import FP8, in_fp8, tensors_of, written
from tests.support.quantised_checkpoints import INT4, in_int4

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
# blocks of 128 that are cut off; groups of 32
SIZES = {
    "deepseek_v3": {"hidden_size": 200, "moe_intermediate_size": 136, "kv_lora_rank": 140, "intermediate_size": 144},
    "qwen3_moe": {"hidden_size": 96, "moe_intermediate_size": 64, "head_dim": 32},
}
BACKEND_OF = {"int4_32": "AMXInt4", "int8": "AMXInt8", "fp8": "AMXFP8", "mxfp4": "MXFP4"}
BACKENDS = {"deepseek_v3": "AMXFP8", "qwen3_moe": "AMXInt4"}


class Checkpoints:
    """One model as codes, in three files, and as bf16 with the weights that the codes stand for."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family, self.backend = family, BACKENDS[family]
        self.plain = make_tiny(family, folder / "plain", sizes=SIZES[family])
        quantised, dequantised = (in_fp8 if family == "deepseek_v3" else in_int4)(tensors_of(self.plain))
        about = FP8 if family == "deepseek_v3" else INT4
        self.codes = written(self.plain, folder / "codes", quantised, files=3, quantization_config=about)
        self.bf16 = written(self.plain, folder / "bf16", dequantised)


@pytest.fixture(scope="module", params=BACKENDS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("codes"), request.param)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("int4"), "qwen3_moe")


def train(folder: Path, name: str, base: Path, **keys: Any) -> Trained:
    """A training of four steps from a YAML file."""
    document: dict[str, Any] = {
        "model_name_or_path": str(base),
        "dataset": "alpaca_tiny",
        "output_dir": str(folder / name),
    }
    document |= {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 5e-3, "cutoff_len": 48}
    document |= {"lora_dropout": 0.1, "lr_scheduler_type": "constant", "kt_num_threads": 1}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document | keys))
    return run(read_config(path), folder)


def losses(trained: Trained) -> list[float]:
    return [row["loss"] for row in trained.log.rows]


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=models.token_ids()).logits
    return found


def adapter_in(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_training_on_codes_is_training_on_their_weights(one: Checkpoints, tmp_path: Path) -> None:
    trained = train(tmp_path, "codes", one.codes, kt_backend=one.backend)
    expected = train(tmp_path, "bf16", one.bf16)
    assert len(losses(trained)) == 4
    assert losses(trained) == losses(expected)
    assert adapter_in(tmp_path / "codes") == adapter_in(tmp_path / "bf16")
    wrappers = trained.model.base_model.model._kt_wrappers
    formats = {wrapper.engine.spec.weight_format for wrapper in wrappers}
    assert formats == {"fp8" if one.family == "deepseek_v3" else "int4"}
    for name in ("gate_up_proj", "down_proj"):  # the model holds one element
        assert all(getattr(w.block[0].experts.get_base_layer(), name).untyped_storage().nbytes() <= 4 for w in wrappers)

    shutil.copytree(tmp_path / "codes", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    for file in ("training.json", "adapter_model.safetensors"):
        (tmp_path / "again" / file).unlink()
    resumed = train(tmp_path, "again", one.codes, kt_backend=one.backend, resume_from_checkpoint=True)
    assert losses(resumed) == losses(expected)
    assert adapter_in(tmp_path / "again") == adapter_in(tmp_path / "bf16")

    # the adapter is an ordinary one: stock peft on the dequantised model, whose experts are in fp32, or in bf16
    stock, peer = (load_model(str(one.bf16), "float32", option="base") for _ in range(2))
    stock = PeftModel.from_pretrained(models.choose_experts(stock, "eager"), str(tmp_path / "codes"))
    peer = models.with_peer(PeftModel.from_pretrained(peer, str(tmp_path / "codes")))
    infer = init_cpu_infer(1, backend=one.backend)
    engine = wrap_moe_layers(load_model(str(one.codes), "bfloat16", option="base", infer=infer), infer).float()
    found, wanted = logits(load_adapter(engine, tmp_path / "codes")), logits(stock)
    assert compare(found, wanted).rel_l2 <= models.budget_beside(compare(logits(peer), wanted).rel_l2)

    merged = export_merged(tmp_path / "codes", tmp_path / "merged")
    same = export_merged(tmp_path / "bf16", tmp_path / "same")
    found_tensors, wanted_tensors = tensors_of(merged), tensors_of(same)
    assert found_tensors.keys() == wanted_tensors.keys()
    assert all(torch.equal(found_tensors[name], tensor) for name, tensor in wanted_tensors.items())
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert torch.equal(*(logits(load_model(str(each), "bfloat16", option="base")) for each in (merged, same)))


def test_export_says_that_it_writes_bf16(int4: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.adapted(load_model(str(int4.codes), "bfloat16", option="base")).save_pretrained(str(tmp_path / "adapter"))
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(int4.codes))
    assert "is quantised: " in (said := capsys.readouterr().err)
    assert "written in bf16" in said
    assert not [path for path in (tmp_path / "merged").iterdir() if path.name.startswith(".")]


def test_a_base_of_codes_becomes_codes_again_on_request(
    one: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.adapted(load_model(str(one.codes), "bfloat16", option="base")).save_pretrained(str(tmp_path / "adapter"))
    found, wanted = (
        export_merged(tmp_path / "adapter", tmp_path / name, base=str(base), to="int8")
        for name, base in (("codes", one.codes), ("bf16", one.bf16))
    )
    said = capsys.readouterr().err
    assert said.count(" in int8: the codes change the experts' weights by ") == 2
    assert "is quantised" not in said
    found_tensors, wanted_tensors = tensors_of(found), tensors_of(wanted)
    assert found_tensors.keys() == wanted_tensors.keys()
    assert any(name.endswith("weight_packed") for name in found_tensors)
    assert all(torch.equal(found_tensors[name], tensor) for name, tensor in wanted_tensors.items())
    assert json.loads((found / "config.json").read_text()) == json.loads((wanted / "config.json").read_text())
    model = load_model(str(found), "bfloat16", option="base")
    assert torch.equal(logits(model), logits(load_model(str(wanted), "bfloat16", option="base")))
    for to, dtype, text in (("int2", None, "--to is 'int2'"), ("fp8", "float32", "--dtype is float32; with --to it")):
        with pytest.raises(ValueError, match=text):
            export_merged(tmp_path / "adapter", tmp_path / "no", base=str(one.bf16), to=to, dtype=dtype)
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("label", ["int4_32", "int8", "fp8", "mxfp4"])
def test_experts_come_from_kt_weight_path(label: str, int4: Checkpoints, tmp_path: Path) -> None:
    coding, case = CODINGS[label], Case.parse("E=8,k=1,H=96,I=64,T=1,r=1,alpha=1")
    every, codes = tensors_of(int4.plain), dict[str, Tensor]()
    for number in (0, 1):
        coded, prefix = draw(coding, case.with_seed(number)), f"model.layers.{number}.mlp.experts."
        codes |= coded_tensors(coded, prefix)
        for name, weights in coded.weights().items():
            every |= {f"{prefix}{expert}.{name}.weight": weight for expert, weight in enumerate(weights)}
    (tmp_path / "codes").mkdir()
    save_file(codes, tmp_path / "codes" / "experts.safetensors")
    infer = init_cpu_infer(1, backend=BACKEND_OF[label], weight_path=str(tmp_path / "codes"))
    plain = load_model(str(written(int4.plain, tmp_path / "bf16", every)), "bfloat16", option="base")
    wanted = logits(models.with_engine(plain))
    model = wrap_moe_layers(load_model(str(int4.plain), "bfloat16", option="base", infer=infer), infer)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)  # a copy reads the files again


@pytest.mark.parametrize("label", ["int8", "int4_32", "fp8"])
def test_codes_are_made_of_a_checkpoint_in_bf16(label: str, int4: Checkpoints, tmp_path: Path) -> None:
    coding, tensors = CODINGS[label], tensors_of(int4.plain)
    for name, weight in tensors.items():
        if ".experts." in name:
            tensors[name] = weights_of(coding, *codes_of(coding, weight[None]), None)[0]
    wanted = models.with_engine(load_model(str(written(int4.plain, tmp_path / "made", tensors)), "bfloat16"))
    infer = init_cpu_infer(1, backend=BACKEND_OF[label])
    found = wrap_moe_layers(load_model(str(int4.plain), "bfloat16", infer=infer), infer)
    assert torch.equal(logits(found), logits(wanted))
    with pytest.raises(ValueError, match=r"^the model has its experts' weights in memory, and the engine is to read"):
        wrap_moe_layers(load_model(str(int4.plain), "bfloat16"), infer)


def test_no_expert_is_dequantised_where_the_engine_takes_codes(
    one: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    dequantised, products, of_files = list[str](), CodedMatrix.products, StoredMatrix.dequantised
    reading = threading.local()  # transformers reads in several threads

    def stored(matrix: StoredMatrix) -> Tensor:
        dequantised.append(matrix.where[0])
        reading.on = True
        found = of_files(matrix)
        reading.on = False
        return found

    def any_product(matrix: CodedMatrix) -> Tensor:
        assert getattr(reading, "on", False), "codes became numbers, and not of a file"
        return products(matrix)

    monkeypatch.setattr(StoredMatrix, "dequantised", stored)
    monkeypatch.setattr(CodedMatrix, "products", any_product)
    infer = init_cpu_infer(1, backend=one.backend)
    logits(wrap_moe_layers(load_model(str(one.codes), "bfloat16", option="base", infer=infer), infer))
    assert any(".self_attn." in name for name in dequantised)
    assert not [name for name in dequantised if ".mlp.experts." in name]


def check_peak(small: str, large: str, experts: int) -> None:
    """AssertionError unless loading and running a model of codes stays far below its experts in bf16, in bytes."""
    quiet("a test")

    def run_model(path: str) -> None:
        infer = init_cpu_infer(1, backend="AMXInt4")
        logits(wrap_moe_layers(load_model(path, "bfloat16", option="base", infer=infer), infer))

    run_model(small)  # loads libraries
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run_model(large)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    grown = (peak - before) / experts
    # codes and scales are 0.28 of bf16, and Linux maps 64 KiB around the first page of each tensor
    expect(grown < 0.5, f"{grown:.2f} times the experts in bf16")


def test_loading_makes_no_bf16_of_the_experts(int4: Checkpoints, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 8, "head_dim": 32}
    plain = make_tiny("qwen3_moe", tmp_path / "plain", sizes=sizes)
    tensors = tensors_of(plain)
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    codes = written(plain, tmp_path / "codes", in_int4(tensors)[0], quantization_config=INT4)
    ChildPool().call_fresh(check_peak, small=str(int4.codes), large=str(codes), experts=experts)


def test_a_note_says_that_codes_become_bf16(
    int4: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "out", int4.codes, max_steps=1)
    assert "INT4 weights are dequantised to bf16; kt_backend AMXInt4 keeps them as codes" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["AMXBF16", "AMXInt4"])
@pytest.mark.parametrize(
    ("about", "text"),
    [
        ("int4", r"/config\.json: quantization_config is 'int4'; it takes an object"),
        ({**INT4, "config_groups": [4]}, r"quantization_config\.config_groups is \[4\]; it takes an object"),
        ({**INT4, "config_groups": {"a": None}}, r"config_groups\['a'\] is null; it takes an object"),
        ({**INT4, "config_groups": {"a": {"weights": "int4"}}}, r"\['a'\]\.weights is 'int4'; it takes an object"),
        (FP8, r"weight_packed is int4; .*/config\.json says quant_method 'fp8', and int4 takes 'compressed-tensors'$"),
    ],
)
def test_a_configuration_that_does_not_describe_int4_is_one_line(
    backend: str, about: Any, text: str, int4: Checkpoints, tmp_path: Path
) -> None:
    path = written(int4.codes, tmp_path / "base", tensors_of(int4.codes), files=3, quantization_config=about)
    with pytest.raises(ValueError, match=rf"^model_name_or_path '.*base' cannot be loaded: .*{text}") as refused:
        train(tmp_path, "out", path, kt_backend=backend)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "keys", "text"),
    [
        ("plain", {"kt_backend": "MXFP4"}, r"not quantised, and method MXFP4_SFT takes mxfp4: name a checkpoint in"),
        ("codes", {"kt_backend": "AMXFP8"}, r"safetensors: .*gate_proj\.weight_packed is int4 \(I32\), method AMXFP8"),
        (
            "codes",
            {"kt_backend": "AMXInt4", "kt_tp_enabled": True, "kt_tp_count": 4},
            r"degrees that would work: 1, 2$",
        ),
        ("plain", {"kt_weight_path": "nowhere"}, r"kt_weight_path is '.*nowhere'; it takes a safetensors file or a"),
        ("torn", {"kt_backend": "AMXInt4"}, r"model-00001-of-00003\.safetensors is no safetensors file: "),
        (3, {}, r"its compressed-tensors are pack-quantized with 3 bits of type int; integers are read: pack"),
        (
            8,
            {"kt_backend": "AMXInt4"},
            r"weight_packed is int4 with a scale for 32 .*config\.json says .*'num_bits': 8",
        ),
        (8, {}, r"proj\.weight_packed is int4 with a scale for 32 .*config\.json says \{'num_bits': 8, "),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    base: str | int, keys: dict[str, Any], text: str, int4: Checkpoints, tmp_path: Path
) -> None:
    path = shutil.copytree(int4.plain if base == "plain" else int4.codes, tmp_path / "base")
    if base == "torn":
        file = path / "model-00001-of-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    if isinstance(base, int):
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = base
        (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=text) as refused:
        train(tmp_path, "out", path, **keys)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
