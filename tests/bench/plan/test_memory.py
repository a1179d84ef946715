"""The memory of a plan, beside what the engine, peft, AdamW and transformers really take."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ktverify._native import clear_buffer_cache
from ktverify.bench.plan import measure
from ktverify.bench.plan.memory import METHOD_OF, Load, engine_layer, layer_use, lora_parameters, process_memory
from ktverify.bench.plan.splits import Split
from ktverify.engines.native.device_experts import DeviceExperts
from ktverify.spec.names import LORA_NAMES
from ktverify.training.moe_model import MoeModel, read_moe_model
from ktverify.training.tiny import FAMILY_SIZES, build_model
from ktverify.training.wrap import attention_layers, find_experts
from tests.support import models
from tests.support.command_line import python
from tests.support.plans import ONE, SMALL

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
        "import json; from tests.bench.plan import test_memory as here; "
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
