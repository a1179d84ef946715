"""Checkpoints as people have them: several files, FP8, names of other times, further layers, tied embeddings, own code.

Each form of one model gives the logits and gradients of its plain form, bit for bit, with the engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.training.acceptance import verify_training
from ktverify.training.config import TrainConfig
from ktverify.training.export import export_merged
from ktverify.training.pretrained import load_model
from ktverify.training.run import run
from ktverify.training.tiny import make_tiny
from ktverify.training.wrap import find_experts
from tests.support import models
from tests.support.checkpoints import FP8, in_fp8, stacked, tensors_of, with_further_layer, written
from tests.support.quantised_checkpoints import INT4

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
FAMILIES = ("deepseek_v3", "qwen3_moe", "mixtral")
# several blocks of 128, the last ones cut off, as DeepSeek-V3's kv_a_proj_with_mqa has them
SIZES = {
    "deepseek_v3": {"hidden_size": 200, "moe_intermediate_size": 136, "kv_lora_rank": 140, "intermediate_size": 144},
    "qwen3_moe": {"hidden_size": 200, "moe_intermediate_size": 136},
    "mixtral": {"hidden_size": 200, "intermediate_size": 136},
}


class Forms:
    """A checkpoint in every form, and which plain one it must equal."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family = family
        self.plain = make_tiny(family, folder / "plain", sizes=SIZES[family])
        tensors = tensors_of(self.plain)
        quantised, dequantised = in_fp8(tensors)
        assert any(min(t.shape) > 1 for name, t in quantised.items() if name.endswith("_scale_inv"))
        self.dequantised = written(self.plain, folder / "dequantised", dequantised)
        fp8 = {"quantization_config": FP8}
        further = {"num_nextn_predict_layers": 1} if family == "deepseek_v3" else {}
        self.of: dict[str, tuple[Path, Path]] = {
            name: (written(self.plain, folder / name, changed, files=files, **config), wanted)
            for name, changed, files, config, wanted in (
                ("several-files", tensors, 3, {}, self.plain),
                ("stacked", stacked(tensors), 1, {}, self.plain),
                ("stacked-several-files", stacked(tensors), 2, {}, self.plain),
                ("further-layer", with_further_layer(tensors, 1), 2, further, self.plain),
                ("fp8", quantised, 1, fp8, self.dequantised),
                ("fp8-several-files", with_further_layer(quantised, 1), 3, {**fp8, **further}, self.dequantised),
            )
        }


FORMS = ("several-files", "stacked", "stacked-several-files", "further-layer", "fp8", "fp8-several-files")


@pytest.fixture(scope="module", params=FAMILIES)
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(tmp_path_factory.mktemp("forms"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(tmp_path_factory.mktemp("one"), "qwen3_moe")


def computed(path: Path) -> dict[str, Tensor]:
    """Logits and gradients with the experts in the engine."""
    model = models.adapted(models.with_engine(load_model(str(path), "bfloat16", option="base")))
    return models.forward_backward(model, models.token_ids())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_bits_of_the_plain_one(forms: Forms, form: str) -> None:
    path, plain = forms.of[form]
    model, wanted = (load_model(str(each), "bfloat16", option="base") for each in (path, plain))
    assert model.name_or_path == model.config.name_or_path == str(path)  # what an adapter names as its base
    assert not hasattr(model.config, "quantization_config")
    assert not model.training
    state, stock = model.state_dict(), wanted.state_dict()
    assert state.keys() == stock.keys()
    assert all(torch.equal(state[name], stock[name]) for name in stock)
    assert {tensor.dtype for tensor in state.values()} == {tensor.dtype for tensor in stock.values()}
    found, expected = computed(path), computed(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fp8_is_dequantised_to_float32_without_a_rounding(one: Forms) -> None:
    path, _ = one.of["fp8"]
    model = load_model(str(path), "float32", option="base")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = tensors_of(path)
    found, numbers, scales = model.state_dict()[name], tensors[name].float(), tensors[f"{name}_scale_inv"]
    for (i, j), scale in zip(torch.cartesian_prod(*map(torch.arange, scales.shape)), scales.flatten(), strict=True):
        block = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
        assert torch.equal(found[block], numbers[block] * scale)


def test_an_fp8_checkpoint_trains_as_its_dequantised_weights(one: Forms, tmp_path: Path) -> None:
    path, plain = one.of["fp8-several-files"]
    losses = []
    for name, base in (("fp8", path), ("plain", plain)):
        keys = {"model_name_or_path": str(base), "dataset": "alpaca_tiny", "output_dir": str(tmp_path / name)}
        trained = run(
            TrainConfig.model_validate({**keys, "max_steps": 3, "logging_steps": 1, "learning_rate": 5e-3}), tmp_path
        )
        losses.append([row["loss"] for row in trained.log.rows])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    assert {answer.name for answer in verify_training(tmp_path / "fp8", None) if answer.passed is False} <= {"loss"}
    made, same = (export_merged(tmp_path / "fp8", tmp_path / f"m{b.name}", base=str(b)) for b in (path, plain))
    assert all(torch.equal(tensor, tensors_of(made)[name]) for name, tensor in tensors_of(same).items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight_block_size": None}, "its FP8 has weight_block_size None; it takes the rows and columns of a block"),
        ({"weight_block_size": [128, 64]}, r"blocks of 128 x 64 in \[\d+, \d+\] has scales \[\d, \d\]"),
        ("without", r"o_proj\.weight is fp8 and has no .*o_proj\.weight_scale_inv"),
        ("e5m2", r"o_proj\.weight is F8_E5M2 .*; fp8 takes F8_E4M3"),
        ("bytes", r"o_proj\.weight_scale_inv is U8 "),
        ("torn", r"model\.safetensors is no safetensors file: "),
    ],
)
def test_fp8_that_is_not_read_is_one_line(one: Forms, tmp_path: Path, change: Any, text: str) -> None:
    path, _ = one.of["fp8"]
    tensors = tensors_of(path)
    name = "model.layers.0.self_attn.o_proj.weight"
    if change == "without":
        del tensors[f"{name}_scale_inv"]
    elif change == "e5m2":
        tensors[name] = tensors[name].float().to(torch.float8_e5m2)
    elif change == "bytes":
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].to(torch.uint8)
    about = {**FP8, **change} if isinstance(change, dict) else FP8
    broken = written(path, tmp_path / "broken", tensors, quantization_config=about)
    if change == "torn":
        (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"^base '.*broken' cannot be loaded: .*{text}") as raised:
        load_model(str(broken), "bfloat16", option="base")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ("fp8", r"/config\.json: quantization_config is 'fp8'; it takes an object"),
        (["fp8"], r"/config\.json: quantization_config is \['fp8'\]; it takes an object"),
        (8, r"/config\.json: quantization_config is 8; it takes an object"),
        (False, r"/config\.json: quantization_config is False; it takes an object"),
        ({}, r"/config\.json: quantization_config has no quant_method; it takes a string, as 'fp8'"),
        ({**FP8, "quant_method": None}, r"/config\.json: quantization_config\.quant_method is null; it takes a string"),
        ({**FP8, "quant_method": 8}, r"/config\.json: quantization_config\.quant_method is 8; it takes a string, as"),
        (
            {**FP8, "weight_block_size": [128, True]},
            r"quantization_config\.weight_block_size is \[128, True\]; it takes two",
        ),
        ({**FP8, "quant_method": "mxfp4"}, r"quant_method is 'mxfp4', and weight_block_size is there; .* takes 'fp8'"),
        (INT4, r"weight is fp8; .*/config\.json says \{'num_bits': 4, "),
        (
            {"quant_method": "mxfp4"},
            r"model\.safetensors: .*weight is fp8; .*/config\.json says quant_method 'mxfp4', and fp8 takes 'fp8' or",
        ),
        (
            {"quant_method": "gptq", "bits": 4},
            r"weight is fp8; .*/config\.json says quant_method 'gptq', and fp8 takes",
        ),
        (
            None,
            r"weight is fp8, and .*/config\.json has no quantization_config; fp8 takes quant_method 'fp8' or 'compr",
        ),
    ],
)
def test_a_configuration_that_does_not_describe_fp8_is_one_line(
    one: Forms, tmp_path: Path, about: Any, text: str
) -> None:
    path, _ = one.of["fp8"]
    broken = written(path, tmp_path / "broken", tensors_of(path), quantization_config=about)
    with pytest.raises(ValueError, match=rf"^base '.*broken' cannot be loaded: .*{text}") as raised:
        load_model(str(broken), "bfloat16", option="base")
    assert "\n" not in str(raised.value)


def test_a_null_beside_plain_weights_is_no_quantisation(one: Forms, tmp_path: Path) -> None:
    path = written(one.plain, tmp_path / "null", tensors_of(one.plain), quantization_config=None)
    state, wanted = (load_model(str(each), "bfloat16", option="base").state_dict() for each in (path, one.plain))
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


LINEAR, EXPERTS = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts"


@pytest.mark.parametrize("form", ["plain", "fp8"])
@pytest.mark.parametrize(
    ("start", "cut", "text"),
    [
        (LINEAR, False, f"it lacks {LINEAR}"),
        (LINEAR, True, f"its {LINEAR} has the shape [200, 79]; the model takes [200, 80]"),
        (f"{EXPERTS}.", False, f"it lacks {EXPERTS}.down_proj, and 1 more"),
        (f"{EXPERTS}.7.", False, f"its {EXPERTS}.down_proj has the shape [7, 200, 136]; the model takes [8, 200, 136]"),
        (f"{EXPERTS}.3.up_proj", False, f"it lacks {EXPERTS}.3.up_proj.weight"),
        (
            f"{EXPERTS}.3.up_proj",
            True,
            f"its {EXPERTS}.3.up_proj.weight has the shape [136, 199]; that of other experts is [136, 200]",
        ),
    ],
)
def test_a_tensor_that_is_missing_or_cut_is_named(
    one: Forms, tmp_path: Path, form: str, start: str, cut: bool, text: str
) -> None:
    path = one.plain if form == "plain" else one.of[form][0]
    tensors = tensors_of(path)
    for name in [name for name in tensors if name.startswith(start)]:
        if not cut:
            del tensors[name]
        elif name.endswith(".weight"):
            tensors[name] = tensors[name][:, :-1]
    broken = written(path, tmp_path / "broken", tensors)
    with pytest.raises(ValueError, match=re.escape(f"base {str(broken)!r} cannot be loaded: {text}") + "$"):
        load_model(str(broken), "bfloat16", option="base")


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_tied_embeddings_stay_tied(family: str, tmp_path: Path) -> None:
    plain = make_tiny(family, tmp_path / "plain")
    tensors = {name: tensor for name, tensor in tensors_of(plain).items() if name != "lm_head.weight"}
    tied = written(plain, tmp_path / "tied", tensors, files=2, tie_word_embeddings=True)
    written(plain, tmp_path / "apart", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    found, wanted = computed(tied), computed(tmp_path / "apart")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    keys = {"model_name_or_path": str(tied), "dataset": "alpaca_tiny", "output_dir": str(tmp_path / "out")}
    run(TrainConfig.model_validate({**keys, "max_steps": 1, "cutoff_len": 32}), tmp_path)
    merged = export_merged(tmp_path / "out", tmp_path / "merged")
    assert tensors_of(merged).keys() == tensors.keys()
    model = load_model(str(merged), "bfloat16", option="merged")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


CODE = """
from pathlib import Path
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
Path(r"{mark}").touch()
class OwnConfig(Qwen3MoeConfig):
    model_type = "{kind}"
class OwnForCausalLM(Qwen3MoeForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(("kind", "loads"), [("qwen3_moe", True), ("of_its_own", False)])
def test_a_models_own_code_runs_only_on_request(
    kind: str, loads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    plain = make_tiny("qwen3_moe", tmp_path / "plain")
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    # transformers stacks the experts of its own families alone
    own = written(plain, tmp_path / "own", stacked(tensors_of(plain)), model_type=kind, auto_map=auto)
    (own / "modeling_own.py").write_text(CODE.format(mark=mark, kind=kind))
    if loads:  # by transformers' own code for the family
        assert find_experts(load_model(str(own), "bfloat16", option="base"))
    else:
        with pytest.raises(
            ValueError, match=r"^base '.*own' needs code of its own, which runs with trust_remote"
        ) as raised:
            load_model(str(own), "bfloat16", option="base")
        assert "\n" not in str(raised.value)
    assert not mark.exists()
    assert TrainConfig.model_fields["trust_remote_code"].default is False
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    assert find_experts(load_model(str(own), "bfloat16", option="base", trust=True))
    assert mark.exists()
