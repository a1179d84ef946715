"""export-adapter: round trips give equal tensors and logits; every format has the deltas and names that others read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktverify.system import optional_peers
from ktverify.system.files import ROOT
from ktverify.training import add_adapter, load_adapter, lora_config
from ktverify.training.adapter import KT_TENSORS
from ktverify.training.adapter_formats import CONFIG, FORMATS, KT_MANIFEST, TENSORS, export_adapter
from ktverify.training.export import export_merged
from ktverify.training.pretrained import load_model
from ktverify.training.tiny import make_tiny
from tests.support.command_line import call, ends, refused
from tests.support.models import fill, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*target_parameters.*:UserWarning")
FAMILIES = ("qwen3_moe", "deepseek_v2", "mixtral")
RANK, ALPHA = 4, 12
# of one expert, in the checkpoints of each family: gate, up, down
NAMES = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}
USUAL = ("mlp", ("gate_proj", "up_proj", "down_proj"))


class Made:
    """A tiny base, and one adapter in each format. own: whether gate and up have an A of their own."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family = folder, family
        self.base = make_tiny(family, folder / "base")
        self.weights = load_file(self.base / "model.safetensors")
        stock = self.model()
        adapted = fill(add_adapter(self.model(), lora_config(stock, rank=RANK, alpha=ALPHA)))
        with torch.no_grad():
            for parameter in adapted.parameters():  # numbers that kt's bfloat16 has as well
                parameter.copy_(parameter.bfloat16())
        adapted.peft_config["default"].base_model_name_or_path = str(self.base)
        adapted.save_pretrained(str(folder / "peft"))
        for form in FORMATS[1:]:
            export_adapter(folder / "peft", folder / form, form)
        self._make_own()

    def _make_own(self) -> None:
        """The adapter of another program, per-expert and of kt, in which gate and up do not share their A."""
        tensors = tensors_of(self.folder / "per-expert")
        draw = torch.Generator().manual_seed(9)
        up = NAMES.get(self.family, USUAL)[1][1]
        for name, tensor in tensors.items():
            if ".experts." in name and f".{up}.lora_A" in name:
                tensors[name] = (torch.randn(tensor.shape, generator=draw) * 0.1).bfloat16().float()
        own = self.folder / "own-per-expert"
        own.mkdir()
        save_file(tensors, own / TENSORS)
        (own / CONFIG).write_bytes((self.folder / "per-expert" / CONFIG).read_bytes())
        export_adapter(own, self.folder / "own-kt", "kt")

    def model(self) -> Any:
        return load_model(str(self.base), "float32", option="base")

    def logits(self, adapter: Path) -> Tensor:
        model = load_adapter(self.model(), adapter).eval()
        with torch.no_grad():
            found: Tensor = model(input_ids=token_ids()).logits
        return found

    def deltas(self, adapter: Path) -> dict[str, Tensor]:
        """B A of every projection of every expert, by its name in the checkpoint, from the adapter's own file."""
        block, projections = NAMES.get(self.family, USUAL)
        found = {}
        if (adapter / KT_TENSORS).is_file():
            kt = load_file(adapter / KT_TENSORS)
            for key in {name.rpartition("_")[0] for name in kt}:
                layer, kind = re.fullmatch(r"layers\.(\d+)\.experts\.(gate|up|down)_lora", key).groups()  # type: ignore[union-attr]
                projection = projections[("gate", "up", "down").index(kind)]
                for e, (a, b) in enumerate(zip(kt[f"{key}_a"].float(), kt[f"{key}_b"].float(), strict=True)):
                    found[f"model.layers.{layer}.{block}.experts.{e}.{projection}.weight"] = b @ a
            return found
        tensors = tensors_of(adapter)
        for name, a in tensors.items():
            if ".experts." in name and ".lora_A." in name:
                plain = name.removeprefix("base_model.model.").replace("lora_A.", "")
                found[plain] = tensors[name.replace("lora_A", "lora_B")] @ a
        return found


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("formats"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("formats"), "qwen3_moe")


def tensors_of(adapter: Path) -> dict[str, Tensor]:
    """Of adapter_model.safetensors, and of kt's file."""
    return {
        name: tensor.float()
        for file in (TENSORS, KT_TENSORS)
        if (adapter / file).is_file()
        for name, tensor in load_file(adapter / file).items()
    }


def config_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / CONFIG).read_text())
    return found


@pytest.mark.parametrize(
    ("start", "via", "end"),
    [
        ("peft", "per-expert", "peft"),
        ("peft", "kt", "peft"),
        ("kt", "per-expert", "kt"),
        ("own-kt", "peft", "kt"),
        ("own-per-expert", "peft", "per-expert"),
    ],
)
def test_a_round_trip_gives_equal_tensors_and_logits(
    made: Made, tmp_path: Path, start: str, via: str, end: str
) -> None:
    first = made.folder / start
    middle = export_adapter(first, tmp_path / "middle", via)
    last = export_adapter(middle, tmp_path / "last", end)
    one, two = tensors_of(first), tensors_of(last)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    keys = ("r", "lora_alpha", "use_rslora")
    assert [config_of(last)[key] for key in keys] == [config_of(first)[key] for key in keys]
    assert set(config_of(last)["target_modules"]) == set(config_of(first)["target_modules"])
    whole = [
        path if end == "peft" else export_adapter(path, tmp_path / f"{path.name}-peft", "peft")
        for path in (first, last)
    ]
    found, wanted = (made.logits(path) for path in whole)
    assert torch.equal(found, wanted)
    if via == "peft":
        assert config_of(middle)["r"] == 2 * RANK
        assert torch.equal(made.logits(middle), wanted)


def test_every_format_has_the_deltas_that_merging_adds(made: Made, tmp_path: Path) -> None:
    """The base's tensors plus alpha / r times B A of a format's own file are those of the merged checkpoint."""
    scaling = ALPHA / RANK
    for source, others in (("peft", ("per-expert", "kt")), ("own-peft", ("own-per-expert", "own-kt"))):
        if source == "own-peft":
            export_adapter(made.folder / "own-kt", made.folder / source, "peft")
        merged = load_file(
            export_merged(made.folder / source, tmp_path / source, dtype="float32") / "model.safetensors"
        )
        experts = {name for name in made.weights if ".experts." in name}
        for other in others:
            deltas = made.deltas(made.folder / other)
            assert deltas.keys() == experts  # by the names in the checkpoint
            for name, delta in deltas.items():
                wanted = made.weights[name].float() + scaling * delta
                torch.testing.assert_close(merged[name], wanted, rtol=1e-4, atol=1e-5)


def test_per_expert_files_follow_the_rules_of_vllm_and_sglang(made: Made) -> None:
    """Their loaders' rules: base_model.model.<module>.lora_{A,B}.weight, for experts a module experts.{e}.<projection>
    of the checkpoint; A [r, in], B [out, r] with r as configured, scaling alpha / r; gate and up together."""
    folder = made.folder / "per-expert"
    config, tensors = config_of(folder), tensors_of(folder)
    projections = NAMES.get(made.family, USUAL)[1]
    assert {name.split(".")[-1] for name in config["target_modules"]} >= set(projections)
    assert not config["target_parameters"]
    assert not config["use_rslora"]  # SGLang 0.5 scales by alpha / r all the same
    modules = set()
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found, name
        module, letter = found.groups()
        outputs, inputs = made.weights[f"{module}.weight"].shape
        assert list(tensor.shape) == ([RANK, inputs] if letter == "A" else [outputs, RANK])
        if ".experts." in module:
            assert re.fullmatch(rf"experts\.\d+\.({'|'.join(projections)})", module[module.index("experts.") :])
        modules.add(module)
    gates = {module for module in modules if module.endswith(f".{projections[0]}") and ".experts." in module}
    assert gates
    for gate in gates:  # an A of peft is exactly the same in both
        up = gate.replace(f".{projections[0]}", f".{projections[1]}")
        a, b = (tensors[f"base_model.model.{module}.lora_A.weight"] for module in (gate, up))
        assert torch.equal(a, b)


def test_kts_files_are_as_kt_kernel_checks_them(made: Made) -> None:
    folder = made.folder / "kt"
    manifest = json.loads((folder / KT_MANIFEST).read_text())
    assert (manifest["version"], manifest["status"], manifest["expert_weight_format"]) == (1, "ready", "bf16")
    assert manifest["base"] == {"model_name_or_path": str(made.base)}
    assert manifest["lora"] == {"rank": RANK, "alpha": float(ALPHA)}
    assert manifest["artifacts"].keys() == {CONFIG, TENSORS, KT_TENSORS}
    for name, record in manifest["artifacts"].items():
        content = (folder / name).read_bytes()
        assert (record["size"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    tensors = load_file(folder / KT_TENSORS)
    record = manifest["artifacts"][KT_TENSORS]
    assert record["tensor_count"] == len(tensors)
    assert record["tensors"] == {
        name: {"shape": list(tensor.shape), "dtype": "BF16"} for name, tensor in tensors.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any(".experts." in name for name in load_file(folder / TENSORS))
    assert not config_of(folder)["target_parameters"]


def test_rslora_becomes_an_alpha_of_the_same_scaling(one: Made, tmp_path: Path) -> None:
    folder = tmp_path / "rslora"
    copy_adapter(one.folder / "peft", folder, use_rslora=True)
    found = config_of(export_adapter(folder, tmp_path / "per-expert", "per-expert"))
    assert not found["use_rslora"]
    assert found["lora_alpha"] / found["r"] == ALPHA / RANK**0.5
    back = export_adapter(tmp_path / "per-expert", tmp_path / "back", "peft")
    torch.testing.assert_close(one.logits(back), one.logits(folder))


def test_float32_factors_are_rounded_for_kt_alone(one: Made, tmp_path: Path) -> None:
    tensors = tensors_of(one.folder / "peft")
    folder = tmp_path / "fine"
    copy_adapter(one.folder / "peft", folder)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, folder / TENSORS)
    kt, per_expert = (export_adapter(folder, tmp_path / form, form) for form in ("kt", "per-expert"))
    wanted, rounded = (one.deltas(path) for path in (per_expert, kt))
    for name, delta in wanted.items():
        assert not torch.equal(delta, rounded[name])
        torch.testing.assert_close(rounded[name], delta, rtol=0, atol=2**-7 * float(delta.abs().max()))


def copy_adapter(source: Path, target: Path, **changes: Any) -> None:
    """The adapter in a new directory, with `changes` in its configuration."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / CONFIG).write_text(json.dumps({**config_of(source), **changes}))


def test_the_command_and_what_it_refuses(one: Made, tmp_path: Path) -> None:
    out, x = tmp_path / "out", tmp_path / "x"
    fused = one.folder / "peft"
    assert "per-expert" in ends(call("export-adapter", fused, "--out", out, "--format", "per-expert"), 0)

    def is_refused(adapter: Path, text: str, form: str = "peft") -> None:
        refused(call("export-adapter", adapter, "--out", x, "--format", form), text)
        assert not x.exists()

    refused(call("export-adapter", fused, "--out", out, "--format", "peft"), "out exists: name another directory")
    is_refused(fused, "--format is 'gguf', it takes peft, per-expert, kt", "gguf")
    is_refused(tmp_path, "holds no adapter")
    rows: list[tuple[Path, dict[str, Any], str]] = [
        (fused, {"rank_pattern": {"q_proj": 8}}, "has a rank_pattern: adapters of one rank and one alpha can be"),
        (fused, {"alpha_pattern": {"q_proj": 8}}, "has a alpha_pattern: adapters of one rank and one alpha can be"),
        (fused, {"target_modules": ".*_proj"}, "has a pattern as target_modules"),
        (fused, {"use_dora": True}, "has use_dora: LoRA without magnitudes can be converted"),
        (
            fused,
            {"r": 8},
            r"LoRA of gate in model\.layers\.0\.mlp\.experts is A \[8, 4, 72\] and B \[8, 40, 4\]; .* ask",
        ),
        (one.folder / "kt", {"lora_alpha": 8}, "has rank 4 and alpha 12.0, adapter_config.json beside it 4 and 8"),
    ]
    for number, (source, changes, text) in enumerate(rows):
        copy_adapter(source, tmp_path / f"changed{number}", **changes)
        is_refused(tmp_path / f"changed{number}", text)


def test_files_that_do_not_fit_are_refused(one: Made, tmp_path: Path) -> None:
    def is_refused(source: str, change: Any, text: str, file: str = TENSORS) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        copy_adapter(one.folder / source, folder)
        tensors = change(load_file(folder / file))
        save_file(tensors, folder / file)
        with pytest.raises(ValueError, match=text):
            export_adapter(folder, tmp_path / "x", "peft")
        assert not (tmp_path / "x").exists()

    def without(part: str) -> Any:
        return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}

    is_refused("per-expert", without(".3.down_proj.lora_B"), r"the adapter has no .*\.3\.down_proj\.lora_B\.weight: it")
    is_refused("kt", without("layers.1.experts.up_lora_a"), r"has no layers\.1\.experts\.up_lora_a: it", KT_TENSORS)
    more = {"layers.7.experts.gate_lora_a": torch.zeros(1)}
    is_refused("kt", lambda tensors: tensors | more, r"has layers\.7\..*of another base", KT_TENSORS)
    attention = "base_model.model.model.layers.0.self_attn.q_proj"
    magnitude = {f"{attention}.lora_magnitude_vector": torch.ones(6)}
    is_refused(
        "peft", lambda tensors: tensors | magnitude, "lora_magnitude_vector: lora_A and lora_B of linear modules"
    )
    ninth = {
        f"base_model.model.model.layers.0.mlp.experts.8.up_proj.lora_{part}.weight": torch.zeros(1) for part in "AB"
    }
    is_refused("per-expert", lambda tensors: tensors | ninth, r"experts\.8\.up_proj.*of another base")
    wide = {"base_model.model.model.layers.0.mlp.experts.2.up_proj.lora_B.weight": torch.zeros(41, RANK)}
    is_refused("per-expert", lambda tensors: tensors | wide, "up_proj differs in size from expert to expert")
    shared = {"base_model.model.model.layers.0.mlp.shared_experts.up_proj.lora_A.weight": torch.zeros(RANK, 72)}
    is_refused(
        "kt", lambda tensors: tensors | shared, r"shared_experts\.up_proj.* beside the routed experts: peft takes"
    )
    torn = tmp_path / "torn"
    copy_adapter(one.folder / "kt", torn)
    (torn / KT_TENSORS).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"the adapter in .*torn cannot be read: "):
        export_adapter(torn, tmp_path / "x", "peft")


def test_an_adapter_of_kt_is_not_loaded_without_its_experts(one: Made) -> None:
    with pytest.raises(
        ValueError, match=r"kt-kernel's format, and peft would leave out fused_expert_lora.safetensors: "
    ):
        load_adapter(one.model(), one.folder / "kt")


def test_lora_beside_the_experts_stays(one: Made, tmp_path: Path) -> None:
    """kt-kernel's lora_target: all reaches shared experts, whose names are those of the routed ones."""
    folder = tmp_path / "kt"
    copy_adapter(
        one.folder / "kt", folder, target_modules=["q_proj", "gate_proj", "down_proj"], exclude_modules=".*7.*"
    )
    name = "base_model.model.model.layers.0.mlp.shared_experts.gate_proj.lora_A.weight"
    save_file(load_file(folder / TENSORS) | {name: torch.ones(RANK, 72)}, folder / TENSORS)
    found = export_adapter(folder, tmp_path / "per-expert", "per-expert")
    assert torch.equal(tensors_of(found)[name], torch.ones(RANK, 72))
    assert config_of(found)["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert config_of(found)["exclude_modules"] is None
    back = export_adapter(found, tmp_path / "back", "kt")
    assert config_of(back)["target_modules"] == ["gate_proj", "q_proj"]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["adapter_formats.py", str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples" / "adapter_formats.py"), run_name="__main__")
    assert "equal logits" in capsys.readouterr().out


def peer(need: str) -> Path:
    found, reason = optional_peers.find(need, {})
    if found is None:
        pytest.skip(f"the loader of a peer reads the files: {reason}")
    return found


def test_vllms_own_loader_reads_a_per_expert_adapter(made: Made) -> None:
    """Its LoRAModel.from_local_checkpoint and PEFTHelper on the CPU, the rest of vllm being stand-ins."""
    package = peer("vllm_library").parent
    block = NAMES.get(made.family, USUAL)
    expected = [f"experts.{e}.{projection}" for e in range(8) for projection in block[1]]
    expected += [name.split(".")[-1] for name in config_of(made.folder / "peft")["target_modules"]]
    script = ROOT / "tests" / "support" / "vllm_loader.py"
    command = [sys.executable, str(script), str(package), str(made.folder / "per-expert"), json.dumps(expected)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["rank"], found["scaling"]) == (RANK, ALPHA / RANK)
    tensors = tensors_of(made.folder / "per-expert")
    assert found["modules"] == {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): [
            list(tensor.shape),
            list(tensors[name.replace("lora_A", "lora_B")].shape),
        ]
        for name, tensor in sorted(tensors.items())
        if "lora_A" in name
    }


def test_kt_kernels_own_converter_reads_a_kt_adapter(one: Made, tmp_path: Path) -> None:
    """Its converter for SGLang writes the tensors of our per-expert format."""
    python = peer("kt_python")
    (file,) = python.parent.parent.glob("lib/python3*/site-packages/kt_kernel/sft/convert_kt_to_sglang_adapter.py")
    spec = importlib.util.spec_from_file_location("convert_kt_to_sglang_adapter", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for source in ("kt", "own-kt"):
        out = tmp_path / source
        module.convert_kt_to_sglang_adapter(one.folder / source, out, base_model_name_or_path=str(one.base))
        found = tensors_of(out)
        wanted = tensors_of(one.folder / source.replace("kt", "per-expert"))
        assert found.keys() == {name.removeprefix("base_model.model.") for name in wanted}
        assert all(
            torch.equal(found[name.removeprefix("base_model.model.")], tensor) for name, tensor in wanted.items()
        )


def test_a_tensor_that_is_no_lora_stays_as_it_is(one: Made, tmp_path: Path) -> None:
    """Also where gate and up have an A of their own, so that peft's format has twice the rank."""
    source = "own-per-expert"
    beside = {
        "base_model.model.model.norm.weight": torch.arange(6.0),
        "base_model.model.score.weight": torch.ones(6, 6),
    }
    copy_adapter(one.folder / source, tmp_path / "given")
    tensors = load_file(one.folder / source / TENSORS)
    save_file(tensors | beside, tmp_path / "given" / TENSORS)
    wide = export_adapter(tmp_path / "given", tmp_path / "wide", "peft")
    back = export_adapter(wide, tmp_path / "back", "per-expert")
    found = load_file(back / TENSORS)
    assert config_of(wide)["r"] == 2 * config_of(back)["r"]
    for name, tensor in (tensors | beside).items():
        assert torch.equal(found[name], tensor), name
