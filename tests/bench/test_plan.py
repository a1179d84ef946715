"""`plan`: its arithmetic beside what the engine, peft, torch.distributed and transformers really take and send."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ktverify._native import clear_buffer_cache
from ktverify.bench.plan import measure, steps
from ktverify.bench.plan.hardware import Hardware
from ktverify.bench.plan.memory import METHOD_OF, Load, engine_layer, layer_use, lora_parameters, process_memory
from ktverify.bench.plan.plan import plan
from ktverify.bench.plan.splits import Split
from ktverify.bench.plan.steps import Efficiency, Routing, reached, step_time, traffic_bytes
from ktverify.engines.argument_checks import LayerSpec
from ktverify.engines.expert_parallel import Share
from ktverify.engines.native.device_experts import DeviceExperts
from ktverify.spec.names import LORA_NAMES
from ktverify.training.moe_model import MoeModel, read_moe_model
from ktverify.training.tiny import FAMILY_SIZES, build_model
from ktverify.training.wrap import attention_layers, find_experts
from tests.support import models, ranks
from tests.support.command_line import call, python, refused

ONE = Split("one process")
SMALL = MoeModel("small", 2, 8, 2, 512, 256, 1_000_000, ((512, 512),) * 4)
# two machines of two nodes whose limits are easy to divide by
TWO = Hardware(2, 2, memory=2.0**40, bandwidth=4e9, peak=4e12, network=1e9, local=2e9)
GPU = replace(TWO, machines=1, gpu_memory=2.0**36, gpu_bandwidth=1e12, gpu_peak=1e14, gpu_link=1e12)


# ---- memory, beside the engine


LARGE = MoeModel("large", 1, 12, 2, 1024, 512, 0, ())
TOKENS = 2048  # so many that the padding of an expert's rows, which depends on the routing, hardly counts


def taken(format: str) -> dict[str, int]:
    """What a layer takes, in a process whose memory nothing else uses: the growth by loading it and by 3 forwards."""
    from ktverify.bench.host import resident_bytes

    sizes = {name: getattr(LARGE, name) for name in ("layers", "experts", "top_k", "hidden", "intermediate")}
    request = measure.PlanRequest(**sizes, tokens=TOKENS, rank=16, format=format, rounds=1)
    measure.RandomLayer(LARGE, request).calls(TOKENS)[1]["forward"]()  # torch's own memory
    clear_buffer_cache()
    before = resident_bytes()
    layer = measure.RandomLayer(LARGE, request, max_cache_depth=3)
    _, calls = layer.calls(TOKENS)
    clear_buffer_cache()
    loaded = resident_bytes() - before
    for _ in range(3):
        calls["forward"]()
    clear_buffer_cache()
    assert layer.layer.packed_experts == 12
    return {"loaded": loaded, "saved": resident_bytes() - before - loaded}


@pytest.fixture(scope="module")
def growth() -> dict[str, dict[str, int]]:
    program = (
        "import json; from tests.bench import test_plan as here; "
        f"print(json.dumps({{format: here.taken(format) for format in {tuple(METHOD_OF)!r}}}))"
    )
    done = python("-c", program, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("format", METHOD_OF)
def test_a_layer_takes_what_the_plan_says(format: str, growth: dict[str, dict[str, int]]) -> None:
    load = Load(TOKENS, 16, format)
    spec, _ = engine_layer(LARGE, ONE, load)
    use = layer_use(LARGE, ONE, load)
    six = 4 * sum(math.prod(shape) for shape in spec.lora_shapes.values())
    x = TOKENS * LARGE.hidden * 2  # which the calls hold
    assert growth[format]["loaded"] == pytest.approx(12 * use.expert + use.lora + six + x, rel=0.03)
    assert growth[format]["saved"] == pytest.approx(3 * use.saved, rel=0.03)


def test_the_formats_of_deepseek_v3_have_their_published_sizes() -> None:
    model = MoeModel("deepseek_v3", 58, 256, 8, 7168, 2048, 0, ())
    found = {format: process_memory(model, ONE, Load(64, 8, format)).experts / 1e9 for format in METHOD_OF}
    assert found == pytest.approx({"bf16": 1308, "fp8": 654, "int8": 654, "int4": 368, "mxfp4": 347}, rel=0.002)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_lora_and_dense_part_are_those_of_peft_and_transformers(family: str, tmp_path: Path) -> None:
    stock = build_model(family)
    stock.config.save_pretrained(tmp_path)
    everything = sum(parameter.numel() for parameter in stock.parameters())
    block: Any = find_experts(stock)[0]
    found = read_moe_model(tmp_path)
    experts, hidden, intermediate = block.down_proj.shape
    assert (found.layers, found.experts, found.hidden, found.intermediate) == (
        len(find_experts(stock)), experts, hidden, intermediate,
    )  # fmt: skip
    assert found.top_k == stock.config.num_experts_per_tok
    assert found.others + 3 * found.layers * experts * hidden * intermediate == everything
    assert len(found.attention) == len(attention_layers(stock))

    model = models.adapted(models.with_engine(stock))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    tokens = models.token_ids()
    torch.autograd.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    memory = process_memory(found, ONE, Load(tokens.numel(), models.RANK, "bf16"))
    assert memory.lora == sum(parameter.nbytes for parameter in parameters)
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in parameters)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert memory.optimizer == sum(value.nbytes for value in states)
    own = {parameter.data_ptr() for parameter in parameters}
    copies = {
        tensor.data_ptr(): tensor.nbytes
        for wrapper in model.get_base_model()._kt_wrappers
        for tensor in (getattr(wrapper.engine, name) for name in LORA_NAMES)
        if tensor.data_ptr() not in own
    }
    use = layer_use(found, ONE, Load(tokens.numel(), models.RANK, "bf16"))
    assert memory.engine_lora == found.layers * use.lora + sum(copies.values())


def test_the_gpu_holds_what_the_plan_says() -> None:
    split, load = Split("hybrid", gpu_experts=3), Load(64, 5, "bf16")
    spec, _ = engine_layer(SMALL, split, load)
    device = DeviceExperts(replace(spec, num_gpu_experts=3, gpu_device="cpu"))
    held = device.with_base((0, 1, 2), lambda expert, matrices: None)
    held = device.with_lora(held, {name: torch.zeros(shape) for name, shape in spec.lora_shapes.items()})
    assert held.base is not None
    weights = sum(tensor.nbytes for tensor in (*held.base, *held.lora))
    slots = 64 * 2 * 3 / 8
    memory = process_memory(SMALL, split, load)
    assert memory.gpu == SMALL.layers * (weights + 2 * slots * (2 * 512 + 4 * 256))
    # the engine's part has the other slots alone
    assert memory.activations < process_memory(SMALL, ONE, load).activations


def test_ranks_and_parts_divide_the_memory() -> None:
    load = Load(512, 8, "bf16")
    one, four = process_memory(SMALL, ONE, load), process_memory(SMALL, Split("four", ranks=4), load)
    parts = process_memory(SMALL, Split("two", parts=2), load)
    assert four.experts == one.experts / 4
    assert parts.experts == one.experts
    assert four.dense == one.dense == parts.dense
    of_expert, of_attention = lora_parameters(SMALL, 8)
    assert four.lora == 4 * (2 * 2 * of_expert + of_attention)
    with pytest.raises(ValueError, match="9 ranks for 8 experts"):
        process_memory(SMALL, Split("nine", ranks=9), load)
    with pytest.raises(RuntimeError, match="degrees that would work"):
        process_memory(SMALL, Split("three", parts=3), load)
    with pytest.raises(RuntimeError, match="columns of down_proj that share a scale"):
        process_memory(SMALL, Split("sixteen", parts=16), Load(512, 8, "int4"))


# ---- traffic, beside torch.distributed


def sent_by_ranks() -> dict[str, list[int]]:
    """By routing: bytes of rows that this rank hands over, its own experts' among them and without; and its tokens."""
    found: dict[str, list[int]] = {}
    plain, rank = dist.all_to_all_single, dist.get_rank()

    def counted(name: str, output: Any, given: Any, received: Any, sent: list[int], **more: Any) -> Any:
        if given.dtype == torch.bfloat16:  # rows, and not how many of them there are
            of_row = given[0].nbytes if len(given) else 0
            found[name][0] += of_row * sum(sent)
            found[name][1] += of_row * (sum(sent) - sent[rank])
        return plain(output, given, received, sent, **more)

    share = Share(dist.group.WORLD, ranks.CASE.num_experts)
    for name, (parts, ids) in ranks.routings().items():
        tokens = ranks.tokens_of(parts, share.rank, share.size)
        found[name] = [0, 0, tokens.stop - tokens.start]
        dist.all_to_all_single = partial(counted, name)
        ranks._one_call(share, ranks.inputs_of(ids), tokens)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_send_what_the_plan_says(size: int, tmp_path: Path) -> None:
    every = ranks.on_ranks(size, tmp_path, sent_by_ranks)
    case = ranks.CASE
    for name, (_, ids) in ranks.routings().items():
        slots = (ids[: sum(found[name][2] for found in every)] >= 0).mean()
        expected = traffic_bytes(case.qlen, case.top_k, case.hidden) * slots
        assert sum(found[name][0] for found in every) == pytest.approx(expected), name
        assert sum(found[name][1] for found in every) <= expected
    spread = [found["spread"][1] for found in every]
    assert sum(spread) == pytest.approx(traffic_bytes(23, 3, 40) * (size - 1) / size, rel=0.25)


# ---- times


def test_as_many_experts_are_reached_as_random_tokens_reach() -> None:
    drawn = torch.Generator().manual_seed(1)
    for experts, top_k, tokens in ((16, 4, 3), (64, 6, 9), (8, 2, 1)):
        ids = torch.rand(400, tokens, experts, generator=drawn).topk(top_k).indices
        mean = sum(len(set(call.flatten().tolist())) for call in ids) / len(ids)
        assert reached([1 / experts] * experts, top_k, tokens) == pytest.approx(mean, rel=0.02)
    assert reached([0.5, 0.5, 0.0], 2, 7) == 2
    assert reached([0.25] * 4, 1, 0) == 0


def test_rooflines_and_traffic_are_the_formulas() -> None:
    load, routing, limit = Load(4096, 8, "bf16"), Routing.even(SMALL), Efficiency()
    rows, h, i, r, layers = 4096 * 2, 512, 256, 8, 2
    flops = layers * (rows * 6 * h * i * 2 + rows * 6 * r * (h + i) * 3)  # backward: base once more, LoRA twice
    assert step_time(SMALL, ONE, TWO, load, routing, limit).seconds == pytest.approx(flops / 2e12)
    assert step_time(SMALL, Split("TP", parts=2), TWO, load, routing, limit).seconds == pytest.approx(flops / 4e12)
    ranks_of_nodes = step_time(SMALL, Split("EP", ranks=4), TWO, load, routing, limit)
    assert ranks_of_nodes.compute == pytest.approx(flops / 8e12)
    rows_of_one = layers * 4 * (4096 / 4) * 2 * 512 * 2
    assert ranks_of_nodes.sent == pytest.approx(rows_of_one * 3 / 4)
    # a quarter goes to the other process of the machine, a half to the other machine, as that process's does
    assert ranks_of_nodes.traffic == pytest.approx(rows_of_one / 4 / 2e9 + 2 * rows_of_one / 2 / 1e9)
    # one token: two experts are read, in both directions
    few = step_time(SMALL, ONE, TWO, Load(1, 8, "int4"), routing, limit)
    read = 2 * layers * 2 * layer_use(SMALL, ONE, Load(1, 8, "int4")).expert
    assert few.seconds == pytest.approx(read / 2e9)
    half = Efficiency({"forward": [(1.0, 0.5)], "backward": [(1.0, 0.25)]})
    assert step_time(SMALL, ONE, TWO, load, routing, half).seconds == pytest.approx(3 * flops / 2e12, rel=0.02)


def test_efficiency_lies_between_its_points() -> None:
    found = Efficiency({"forward": [(1.0, 0.2), (4.0, 0.6), (64.0, 0.5)]})
    assert [found.share("forward", rows) for rows in (0.5, 1, 2, 4, 16, 64, 999)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.55, 0.5, 0.5]
    )
    assert found.share("backward", 3) == 1
    # eight tokens that reach eight experts have one row each, as one token has
    twice = Efficiency({"forward": [(1.0, 0.2), (1.0, 0.4), (4.0, 0.6)]})
    assert [twice.share("forward", rows) for rows in (0.5, 1, 2, 4)] == pytest.approx([0.2, 0.4, 0.5, 0.6])


def test_counts_of_a_mask_file_choose_experts_and_slow_the_fullest_rank() -> None:
    counts = [[70, 10, 10, 10, 0, 0, 0, 0], [10, 70, 10, 10, 0, 0, 0, 0]]
    routing = Routing.of_counts(SMALL, counts, "mask.json")
    load, split = Load(4096, 8, "bf16"), Split("EP", ranks=4)
    even = step_time(SMALL, split, TWO, load, Routing.even(SMALL), Efficiency())
    uneven = step_time(SMALL, split, TWO, load, routing, Efficiency())
    assert uneven.compute == pytest.approx(even.compute * 0.8 * 4)  # experts 0 and 1 are on one rank
    slow = replace(GPU, peak=4e11)  # so that arithmetic rules
    hybrid = step_time(SMALL, Split("hybrid", parts=2, gpu_experts=1), slow, load, routing, Efficiency())
    alone = step_time(SMALL, Split("TP", parts=2), slow, load, routing, Efficiency())
    assert hybrid.compute == pytest.approx(0.3 * alone.compute)
    with pytest.raises(ValueError, match=r"mask.json counts 1 layers of \[3\] experts"):
        Routing.of_counts(SMALL, [[1, 2, 3]], "mask.json")


# ---- the verdict


def test_the_fastest_split_that_fits_is_named() -> None:
    load = Load(4096, 8, "bf16")
    found = plan(SMALL, replace(TWO, network=1e12, local=1e12), load)
    assert [one.split.name for one in found.chosen] == [
        "one process, one node", "TP of 2 nodes", "EP of 2 machines", "EP of 4 nodes",
    ]  # fmt: skip
    assert all(one.fits for one in found.chosen)
    assert found.fastest is not None
    assert found.fastest.split.name.startswith("EP of ")
    slow = plan(SMALL, replace(TWO, network=1e3, local=1e3), load)
    assert slow.fastest is not None
    assert slow.fastest.split.name == "TP of 2 nodes"
    assert slow.verdict.startswith("bf16: TP of 2 nodes is the fastest of 4 that fit, of 4: at most ")
    least = found.chosen[2].node
    tight = plan(SMALL, replace(TWO, memory=2 * least), load)
    assert [one.fits for one in tight.chosen] == [False, False, True, True]
    none = plan(SMALL, replace(TWO, memory=least), load)
    assert none.fastest is None
    assert none.verdict.startswith("bf16: no split fits; EP of 4 nodes takes least, ")


def test_the_number_of_experts_on_a_gpu_is_the_best_that_fits() -> None:
    load = Load(4096, 8, "bf16")
    every = plan(SMALL, GPU, load).chosen[-1]
    assert every.split.gpu_experts == 8
    assert every.fits
    of_three = plan(SMALL, GPU, load, gpu_experts=3).chosen[-1]
    few = plan(SMALL, replace(GPU, gpu_memory=of_three.gpu), load).chosen[-1]
    assert few.split.name == "hybrid, 3 on a GPU"
    assert few.fits
    # where copies to the GPU take longer than the engine, one expert is best
    assert plan(SMALL, replace(GPU, gpu_link=1e6), load).chosen[-1].split.gpu_experts == 1
    with pytest.raises(ValueError, match="--gpu-experts is 9; it takes 1 to 8"):
        plan(SMALL, GPU, load, gpu_experts=9)


# ---- the measurement


def test_a_prediction_is_made_of_the_calibration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TOKENS", (1, 8))
    monkeypatch.setattr(measure, "_OTHER_DATA", 1 << 12)
    request = measure.request_of(replace(SMALL, hidden=128, intermediate=64), Load(24, 8, "mxfp4"), 2)
    lines = list(measure.lines(request))
    assert sum(isinstance(line, measure.PlanCeilingLine) for line in lines) == 2
    # as if every call had taken twice its roofline's time
    limits = [line for line in lines if isinstance(line, measure.PlanCeilingLine)]
    read, multiply = max(line.read for line in limits), max(line.multiply for line in limits)
    doubled: list[Any] = list(limits)
    for line in lines:
        if isinstance(line, measure.Sample):
            model = measure.calibration_of(request)[0] if line.layer < 0 else measure._model(request)
            load = Load(line.tokens, 8, "mxfp4")
            work = steps.works_of(model, load, line.active * layer_use(model, ONE, load).expert)[line.direction]
            doubled.append(line.model_copy(update={"ns": round(2e9 * work.seconds(read, multiply))}))
    found = measure.measured(request, doubled)
    for points in found.efficiency.points.values():
        assert [share for _, share in points] == pytest.approx([0.5, 0.5], rel=1e-3)
    assert found.predicted == pytest.approx(2 * found.bound, rel=1e-3)
    assert found.predicted == pytest.approx(found.seconds, rel=0.05)
    assert found.passed
    slower = [line.model_copy(update={"ns": 3 * line.ns}) if line.kind == "call" and line.layer >= 0 else line
              for line in doubled]  # fmt: skip
    again = measure.measured(request, slower)
    assert again.predicted == found.predicted
    assert not again.passed


def test_a_large_layer_is_measured_with_fewer_experts_of_as_many_rows() -> None:
    model, load = MoeModel("deepseek_v3", 58, 256, 8, 7168, 2048, 0, ()), Load(2048, 8, "bf16")
    request = measure.request_of(model, load, 3)
    assert request.experts * layer_use(model, ONE, load).expert <= 1 << 30
    assert request.tokens * 8 / request.experts == pytest.approx(2048 * 8 / 256, rel=0.02)
    small = measure.request_of(SMALL, Load(16, 8, "bf16"), 3)
    assert (small.layers, small.experts, small.tokens) == (2, 8, 16)
    tiny = replace(SMALL, hidden=32, intermediate=32)
    assert measure.request_of(tiny, Load(10**5, 8, "bf16"), 3).tokens == LayerSpec.chunked_prefill_size


# ---- config.json, and the command

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "vocab_size": 129280, "num_experts_per_tok": 8, "auto_map": {"AutoConfig": "configuration_deepseek.Config"},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
KIMI_K2 = {
    **V3,
    "model_type": "kimi_k2",
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("config", "layers", "experts", "billions"),
    [
        pytest.param(V3, 58, 256, 671.0, id="deepseek_v3"),
        pytest.param(KIMI_K2, 60, 384, 1026, id="kimi_k2"),
        pytest.param({"model_type": "kimi_k25", "text_config": KIMI_K2}, 60, 384, 1026, id="kimi_k25"),
    ],
)
def test_a_published_configuration_has_its_parameters(
    tmp_path: Path, config: dict[str, Any], layers: int, experts: int, billions: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = read_moe_model(tmp_path)
    assert (found.family, found.layers, found.experts, found.stored) == ("deepseek_v3", layers, experts, "fp8")
    routed = 3 * layers * experts * 7168 * 2048
    assert (found.others + routed) / 1e9 == pytest.approx(billions, rel=1e-3)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
BAD = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "twice a key": '{"model_type": "mixtral", "model_type": "mixtral"}',
    "nested too deeply": "[" * 100_000,
    "no model_type": "{}",
    "another model_type": '{"model_type": 5, "architectures": "Mixtral"}',
    "no causal language model": '{"model_type": "vit"}',
    "without experts": '{"model_type": "qwen3", "num_hidden_layers": 1, "vocab_size": 8}',
    **{
        f"{name}={value!r}"[:40]: json.dumps({**MIXTRAL, name: value})
        for name, value in (
            ("num_hidden_layers", 10**9), ("num_hidden_layers", True), ("num_hidden_layers", "2"),
            ("num_hidden_layers", 0), ("hidden_size", -8), ("hidden_size", "wide"), ("hidden_size", math.nan),
            ("hidden_size", 10**30), ("intermediate_size", 10**18), ("num_local_experts", 0),
            ("num_local_experts", 10**12), ("num_local_experts", 10**7),
            ("num_experts_per_tok", 5), ("num_experts_per_tok", "all"),
            ("num_attention_heads", 0), ("hidden_act", "gelu"), ("rope_scaling", {"type": 3}),
            ("quantization_config", {"quant_method": "fp8", "weight_block_size": "big"}),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_configuration_that_is_none_is_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(BAD[name], encoding="utf-8")
    refused(call("plan", file, "--bandwidth", 10, "--peak", 100), r"^.{10,900}$")


def test_many_labels_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, "num_labels": 10**9}), encoding="utf-8")
    assert read_moe_model(tmp_path).experts == 4


def test_the_command_prints_the_verdict_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3), encoding="utf-8")
    given = {"machines": 2, "nodes": 2, "memory": 600, "bandwidth": 400, "peak": 8000, "network": 12.5, "local": 5}
    machines = [f"--{name}={value}" for name, value in given.items()]
    done = call("plan", tmp_path, *machines)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("PASS fp8: EP of 2 machines is the fastest of 2 that fit, of 4: at most ")
    assert "one process, one node" in done.stdout
    assert "GiB a machine, of 600.0" in done.stdout
    assert "400 GB/s, given" in done.stdout
    found = json.loads(call("plan", tmp_path, *machines, "--json").stdout)
    assert found["fastest"] == "EP of 2 machines"
    assert set(found["splits"]) == set(METHOD_OF)
    assert len(found["splits"]["int4"]) == 4
    assert found["splits"]["fp8"][2]["time"]["sent"] == pytest.approx(58 * 4 * 1024 * 8 * 7168 * 2 / 2)
    small = call("plan", tmp_path, *machines, "--memory", 100)
    assert small.exit_code == 1
    assert small.stdout.startswith("FAIL fp8: no split fits; ")
    gpu = call("plan", tmp_path, *machines, "--gpu-memory", 80)
    assert gpu.exit_code == 2
    assert "give --gpu-bandwidth, --gpu-peak, --gpu-link as well" in gpu.stderr
    for option, wrong, text in (
        ("--gpu-experts", 3, "--gpu-experts is given, and no GPU: give --gpu-memory as well"),
        ("--tokens", 10**12, "tokens is 1000000000000; it takes a positive number, at most 16777216"),
        ("--format", "int3", "--format is 'int3', it takes one of bf16, fp8, int8, int4, mxfp4"),
    ):
        refused(call("plan", tmp_path, *machines, option, wrong), text)
    odd = call("plan", tmp_path, *machines, "--bandwidth", "nan")
    assert odd.exit_code == 2
    assert "--bandwidth is nan; it takes a finite number above 0" in odd.stderr


def test_what_is_not_given_is_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, "hidden_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 320}), encoding="utf-8")  # fmt: skip
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({"num_experts": [4], "gpu_experts": [[1]], "counts": [[1, 7, 0, 0]]}), encoding="utf-8")
    found = json.loads(call("plan", tmp_path, "--mask", mask, "--nodes", 2, "--json").stdout)
    for name in ("bandwidth", "peak", "local"):
        assert found["inputs"][name].endswith("measured here")
        assert found["hardware"][name] > 1e7
    assert found["hardware"]["memory"] > 1 << 30
    mask.write_text(json.dumps({"num_experts": [4], "gpu_experts": [[1]]}), encoding="utf-8")
    done = call("plan", tmp_path, "--mask", mask, "--bandwidth", 10, "--peak", 100)
    assert done.exit_code == 2
    assert "has no counts: python -m ktverify expert-stats writes them" in done.stderr
