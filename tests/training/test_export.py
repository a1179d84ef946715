"""export-merged changes the tensors of the adapter's targets, and nothing else of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktverify.engines.checkpoint_files import INDEX
from ktverify.judge.dequantise import CODINGS, codes_of, weights_of
from ktverify.training.export import export_merged
from ktverify.training.pretrained import load_model, load_tokenizer
from ktverify.training.tiny import FAMILY_SIZES, make_tiny
from tests.support import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
FURTHER = "model.layers.2"


def bits(tensor: Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A DeepSeek-V3 in three files with an index: a layer that predicts further tokens, an fp32 tensor, other files."""
    folder = make_tiny("deepseek_v3", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors.update({name.replace("layers.1", "layers.2"): t + 1 for name, t in tensors.items() if ".layers.1." in name})
    tensors[f"{FURTHER}.eh_proj.weight"] = torch.randn(72, 144).bfloat16()
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = torch.randn(tensors[bias].shape)  # fp32, as in the published one
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names[number::3], file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}, indent=4))
    (folder / "modeling_own.py").write_text("# of the model\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")
    return folder


def tensors_in(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """(file, tensor) of every tensor."""
    return {
        name: (file.name, tensor)
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("target", ["all", "all_attention", "experts"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_only_targets_change(target: str, dtype: str | None, base: Path, tmp_path: Path) -> None:
    adapted = models.adapted(load_model(str(base), "bfloat16", option="base"), target=target)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base), dtype=dtype)
    before, after = tensors_in(base), tensors_in(tmp_path / "merged")
    assert {name: file for name, (file, _) in before.items()} == {name: file for name, (file, _) in after.items()}
    changed = {name for name in before if bits(before[name][1]) != bits(after[name][1])}
    wanted = {"all": ("self_attn", ".experts."), "all_attention": ("self_attn",), "experts": (".experts.",)}[target]
    assert changed == {
        name
        for name in before
        if any(part in name for part in wanted) and "norm" not in name and not name.startswith(FURTHER)
    }
    assert {after[name][1].dtype for name in changed} == {torch.float32 if dtype else torch.bfloat16}
    # what peft merges has these bits
    merged = adapted.merge_and_unload() if dtype is None else None
    if merged is not None:
        weight = merged.state_dict()["model.layers.0.self_attn.o_proj.weight"]
        assert torch.equal(weight, after["model.layers.0.self_attn.o_proj.weight"][1])
    files = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*") if path.is_file()
    }
    differ = {str(path) for path in files if (base / path).read_bytes() != (tmp_path / "merged" / path).read_bytes()}
    assert differ <= {*(file for file, _ in before.values()), *((INDEX, "config.json") if dtype else ())}
    size = json.loads((tmp_path / "merged" / INDEX).read_text())["metadata"]["total_size"]
    assert size == sum(tensor.nbytes for _, tensor in after.values())
    with safe_open(next((tmp_path / "merged").glob("*.safetensors")), "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    load_model(str(tmp_path / "merged"), "bfloat16", option="merged")


@pytest.mark.parametrize(("family", "label"), list(zip(FAMILY_SIZES, ["int8", "int4_32", "fp8"] * 3, strict=False)))
def test_merged_experts_become_codes_on_request(
    family: str, label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    width = "intermediate_size" if family in ("mixtral", "olmoe") else "moe_intermediate_size"
    base = make_tiny(family, tmp_path / "base", sizes={"hidden_size": 96, width: 64})
    models.adapted(load_model(str(base), "bfloat16", option="base")).save_pretrained(str(tmp_path / "adapter"))
    plain, coded = (
        export_merged(tmp_path / "adapter", tmp_path / (to or "plain"), base=str(base), to=to)
        for to in (None, label.removesuffix("_32"))
    )
    said = capsys.readouterr().err
    wanted, found = (load_model(str(each), "bfloat16", option="base").state_dict() for each in (plain, coded))
    assert wanted.keys() == found.keys()
    changes, weights, largest = 0.0, 0.0, 0.0
    for name, tensor in wanted.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert torch.equal(found[name], tensor), name
            continue
        matrices = tensor.unflatten(1, (2, -1)).flatten(0, 1) if "gate_up" in name else tensor
        expected = weights_of(CODINGS[label], *codes_of(CODINGS[label], matrices), None)
        assert torch.equal(found[name], expected.view(tensor.shape)), name
        change = (expected.double() - matrices.double()).abs()
        changes, weights = changes + float(change.square().sum()), weights + float(matrices.double().square().sum())
        largest = max(largest, float((change.amax((1, 2)) / matrices.double().abs().amax((1, 2))).max()))
    assert changes > 0
    assert f"by {100 * (changes / weights) ** 0.5:.2g} % in the root mean square" in said
    assert f"by at most {100 * largest:.2g} % of the largest" in said
    assert not [path for path in coded.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_merged_is_refused(base: Path, tmp_path: Path) -> None:
    models.adapted(load_model(str(base), "bfloat16", option="base")).save_pretrained(str(tmp_path / "adapter"))
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(
        json.dumps({**json.loads(config), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match="is quantised: an adapter cannot be merged into it"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    (base / "config.json").write_text(json.dumps({**json.loads(config), "quantization_config": "gptq"}))
    with pytest.raises(ValueError, match=r"/config\.json: quantization_config is 'gptq'; it takes an object$"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    (base / "config.json").write_text(config)
    for file in base.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        (INDEX, "{", r"index\.json, line 1 is no JSON"),
        (INDEX, '{"metadata": {}}', r"index\.json has no weight_map"),
        (
            "model-00001-of-00003.safetensors",
            "torn",
            r"00001-of-00003\.safetensors is no safetensors file",
        ),
        ("config.json", "[", r"config\.json, line 1 is no JSON"),
        ("../adapter/adapter_config.json", "{", r"adapter_config\.json, line 1 is no JSON"),
        ("../adapter/adapter_config.json", '{"peft_type": "NO"}', r"adapter_config\.json is no configuration of LoRA"),
        ("../adapter/adapter_model.safetensors", "torn", "the adapter in .*/adapter does not fit this base model: "),
    ],
)
def test_a_broken_file_is_named(name: str, content: str, wanted: str, base: Path, tmp_path: Path) -> None:
    models.adapted(load_model(str(base), "bfloat16", option="base")).save_pretrained(str(tmp_path / "adapter"))
    (base / name).write_text(content)
    with pytest.raises(ValueError, match=wanted):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


def test_a_broken_tokenizer_is_named(base: Path) -> None:
    (base / "tokenizer.json").write_text("torn")
    with pytest.raises(ValueError, match=r"^base '.*/base' cannot be loaded: "):
        load_tokenizer(str(base), option="base")
