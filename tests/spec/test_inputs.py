"""Inputs: pinned bits, the right distribution, and integers that are provably exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktverify.errors import NotExact
from ktverify.judge.exactness import prove
from ktverify.judge.reference import forward_backward
from ktverify.spec import data_kinds, generator
from ktverify.spec.cases import Case, catalogue, select
from ktverify.spec.inputs import Inputs, inputs_sha256, make_inputs
from ktverify.spec.names import LORA_NAMES

# the same on every machine; they and the goldens change with GENERATOR_VERSION only
PINNED = {
    "small": "3eba507bce120ab08075dbc97346f6872b35212c0668240c5dcdfad4c4a67003",
    "zipf": "70f29980810e7d1a9139166c4a7e1691c246cf59371f44308b177100f66991c7",
    "masked_slots": "669b52e3c36e115a73382ee16d33e93bdc9f32d11a34bd2913ef6d4a38e1e39a",
    "fp32_lora_odd": "87f3f5e1e8aa68c5cb2c41cd148cd5f4822c43dc3d09754cbc63e13682d564cf",
    "exact_odd": "0e9a37885290529847f8b6d33a94e82c95c344478596759980f400b266caab8b",
    "nan_row": "04f30f9fcd75b0003b5c303d365a83f0a645739ff827c59fe44baeff724f55ed",
    "permuted_slots": "8c75771bb5e1b0236863853282458554718b67c5f6f54e7f7e01c0b909d6a82c",
    "small@seed=18446744073709551616": "7fdb9f023df2c609399d070b9b10c7da5f98e882cdb57ab9debb4e90bb77e0d2",
    "E=3,k=2,H=97,I=47,T=5,r=3,alpha=6@seed=1": "7c5293514da8230b3c3cc776f8a618361c0b025110a5c2cda9ab5898b507c722",
}


@pytest.mark.parametrize("text", PINNED)
def test_bits_are_pinned(text: str) -> None:
    assert generator.GENERATOR_VERSION == 1
    assert inputs_sha256(make_inputs(Case.parse(text))) == PINNED[text]


def test_the_hash_is_the_published_splitmix64() -> None:
    # the reference stream of seed 1234567 (Vigna's splitmix64.c): state + step, then the finaliser
    stream = generator.hashes(np.uint64(1234567), 3, start=1)
    assert [int(v) for v in stream] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_quantiles_are_irwin_hall() -> None:
    quantiles = data_kinds.quantiles()
    assert quantiles.dtype == np.int64
    assert np.all(np.diff(quantiles) >= 0)
    assert np.array_equal(quantiles, -quantiles[::-1])
    assert quantiles.std() == pytest.approx(data_kinds.DEVIATION, rel=2e-5)
    kurtosis = float(np.mean(quantiles.astype(float) ** 4) / quantiles.std() ** 4)
    assert kurtosis == pytest.approx(3 - 6 / 5 / 8, abs=2e-3)  # of a sum of 8 uniform numbers


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3
    ties = torch.arange(1, 2000).float() / 256 + 1
    for tensor in (values, ties, -ties, torch.zeros(1)):
        ours = torch.from_numpy(data_kinds.to_bf16(tensor.numpy()).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(ours, tensor.to(torch.bfloat16))


def test_streams_are_independent() -> None:
    inputs = make_inputs(catalogue()["small"])
    small = catalogue()["small"]
    tensors = [
        *(inputs.gate_proj[0], inputs.gate_proj[1], inputs.up_proj[0], inputs.down_proj[0].T),
        make_inputs(small.with_seed(1)).gate_proj[0],
        make_inputs(replace(small, name="custom")).gate_proj[0],
    ]
    stacked = torch.stack([tensor.float().reshape(-1) for tensor in tensors])
    correlation = torch.corrcoef(stacked) - torch.eye(len(tensors))
    assert float(correlation.abs().max()) < 5 / math.sqrt(stacked.shape[1])


def test_consecutive_values_are_uncorrelated() -> None:
    x = make_inputs(Case.parse("E=1,k=1,H=4096,I=8,T=64,r=1")).hidden_states.float().reshape(-1)
    for lag in (1, 2, 3, 4, 5, 8, 4096):
        assert abs(float(torch.dot(x[:-lag], x[lag:])) / x.numel()) < 5 / math.sqrt(x.numel())


def test_base_and_lora_parts_have_realistic_magnitudes() -> None:
    case = Case.parse("E=2,k=1,H=512,I=384,T=64,r=16,alpha=32")
    inputs = make_inputs(case)
    x, lora = inputs.hidden_states.double(), {n: v[0].double() for n, v in inputs.lora.items()}
    base = x @ inputs.gate_proj[0].double().T
    low = case.scaling * x @ lora["gate_lora_a"].T @ lora["gate_lora_b"].T
    assert float(base.std()) == pytest.approx(1, abs=0.1)
    # a LoRA part of this size cannot be lost within any budget
    assert 0.3 < float(low.std() / base.std()) < 0.5
    assert not torch.equal(inputs.gate_proj, inputs.up_proj)


@pytest.mark.parametrize(
    ("key", "hidden", "upstream"),
    [
        ("data=gaussian", 1, 1),
        ("data=large", 256, 4096),
        ("data=tiny", 2**-20, 2**-20),
        ("magnitude=1e-06", 1e-6, 1e-6),
        ("magnitude=64", 64, 64),
        # beyond 2^8 gates are as open or shut as they get
        ("magnitude=1e4", 256, 1e4),
    ],
)
def test_a_case_has_the_magnitude_that_it_names(key: str, hidden: float, upstream: float) -> None:
    sizes = "E=2,k=1,H=512,I=32,T=64,r=4"
    inputs = make_inputs(Case.parse(f"{sizes},{key}"))
    assert float(inputs.hidden_states.double().std()) == pytest.approx(hidden, rel=0.02)
    assert float(inputs.grad_output.double().std()) == pytest.approx(upstream, rel=0.02)
    assert torch.equal(inputs.gate_proj, make_inputs(Case.parse(sizes)).gate_proj)


def test_a_wrong_lora_scale_exceeds_every_budget() -> None:
    case = catalogue()["small"]
    inputs = make_inputs(case)
    right = forward_backward(inputs)
    wrong = forward_backward(replace(inputs, case=replace(case, alpha=float(case.rank))))
    for name, tensor in right.items():
        assert float((wrong[name] - tensor).norm() / tensor.norm()) > 0.1, name


def test_routing_weights_are_like_those_of_a_softmax() -> None:
    for case in (catalogue()["small"], catalogue()["wide_top_k"]):
        weights = make_inputs(case).weights
        assert weights.dtype == torch.float32
        assert float(weights.min()) > 0
        assert float(weights.sum(1).max()) < 1
        assert len(set(weights.reshape(-1).tolist())) > 0.9 * weights.numel()


def test_nan_and_inf_are_in_one_row() -> None:
    for kind, is_it in (("nan_row", torch.isnan), ("inf_row", torch.isinf)):
        inputs = make_inputs(Case.parse(f"E=4,k=2,H=64,I=32,T=9,r=4,data={kind}"))
        assert is_it(inputs.hidden_states).nonzero()[:, 0].tolist() == [4]
        assert torch.isfinite(inputs.grad_output).all()


def test_zero_b_has_only_a() -> None:
    lora = make_inputs(Case.parse("E=4,k=2,H=64,I=32,T=9,r=4,data=zero_b")).lora
    for name in LORA_NAMES:
        assert bool(lora[name].any()) is name.endswith("_a")


def test_fp32_lora_uses_all_bits_of_the_significand() -> None:
    lora = make_inputs(catalogue()["fp32_lora"]).lora
    for tensor in lora.values():
        assert tensor.dtype == torch.float32
        assert float((tensor.to(torch.bfloat16).float() == tensor).float().mean()) < 0.05
        assert float((tensor.to(torch.float16).float() == tensor).float().mean()) < 0.05


# ---- routing


def ids_of(text: str) -> torch.Tensor:
    return make_inputs(Case.parse(f"{text},H=1,I=1,r=1")).expert_ids


def test_the_slots_of_a_token_name_different_experts() -> None:
    for text in ("E=16,k=4,T=400", "E=16,k=2,T=300,routing=zipf", "E=8,k=8,T=50,routing=zipf"):
        ids = ids_of(text)
        assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    ids = ids_of("E=8,k=3,T=200,routing=one_expert")
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert len(set(ids[:, 0].tolist())) == 1


def test_uniform_routing() -> None:
    counts = torch.bincount(ids_of("E=16,k=4,T=4000").reshape(-1), minlength=16)
    assert float((counts - 1000).abs().max()) < 5 * math.sqrt(1000)


def test_zipf_routing() -> None:
    ids = ids_of("E=16,k=2,T=3000,routing=zipf")
    counts, _ = torch.bincount(ids[:, 0], minlength=16).sort(descending=True)
    harmonic = sum(1 / n for n in range(1, 17))
    for place in range(4):
        assert float(counts[place]) == pytest.approx(3000 / harmonic / (place + 1), rel=0.15)


def test_duplicate_routing() -> None:
    ids = ids_of("E=8,k=3,T=50,routing=duplicate")
    assert torch.equal(ids[:, 0], ids[:, 1])
    assert bool((ids[:, 2] != ids[:, 0]).all())


def test_masked_routing() -> None:
    ids = ids_of("E=8,k=4,T=400,routing=masked")
    assert bool((ids[0] >= 0).all())
    assert bool((ids[-1] == -1).all())
    assert float((ids == -1).float().mean()) == pytest.approx(0.25, abs=0.05)
    assert bool((ids_of("E=8,k=4,T=9,routing=all_masked") == -1).all())


def test_physical_map() -> None:
    inputs = make_inputs(catalogue()["permuted_slots"])
    slots = inputs.physical_map.tolist()
    assert sorted(slots) == list(range(8))
    assert slots != list(range(8))
    for slot, expert in enumerate(slots):
        assert torch.equal(inputs.slotted("gate_proj")[slot], inputs.gate_proj[expert])
    plain = make_inputs(catalogue()["small"])
    assert plain.slotted("up_proj").data_ptr() == plain.up_proj.data_ptr()


# ---- memory


def test_idle_experts_take_no_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    # 3 x 1000 x 1024 x 1024 bf16 are 6.3 GB; one expert of them is reached
    inputs = make_inputs(Case.parse("E=1000,k=1,H=1024,I=1024,T=1,r=1"))
    assert process.memory_info().rss - before < 150e6
    assert inputs.gate_proj.shape == (1000, 1024, 1024)
    idle = next(e for e in range(1000) if e not in inputs.active)
    assert not bool(inputs.gate_proj[idle].any())
    del inputs
    assert process.memory_info().rss - before < 50e6


def test_a_case_without_tokens_has_empty_inputs() -> None:
    empty = make_inputs(catalogue()["no_token"])
    assert empty.hidden_states.shape == (0, 64)
    assert empty.expert_ids.shape == empty.weights.shape == (0, 2)
    assert empty.active == []
    assert len(inputs_sha256(empty)) == 64


def test_the_sha256_depends_on_every_input() -> None:
    case = Case.parse("E=3,k=2,H=8,I=6,T=4,r=2")
    plain = inputs_sha256(make_inputs(case))
    changes: list[Callable[[Inputs], object]] = [
        lambda i: i.hidden_states.view(-1)[3].add_(1),
        lambda i: i.expert_ids[0].copy_(i.expert_ids[0].flip(0)),
        lambda i: i.weights.view(-1)[1].mul_(2),
        lambda i: i.grad_output.view(-1)[31].add_(1),
        lambda i: i.gate_proj[i.active[0]].view(-1)[0].add_(1),
        lambda i: i.up_proj[i.active[-1]].view(-1)[47].add_(1),
        lambda i: i.down_proj[i.active[0]].view(-1)[5].add_(1),
        lambda i: i.physical_map.copy_(i.physical_map.flip(0)),
        *(lambda i, name=name: i.lora[name].view(-1)[1].add_(1) for name in LORA_NAMES),
    ]
    for change in changes:
        inputs = make_inputs(case)
        change(inputs)
        assert inputs_sha256(inputs) != plain


# ---- integers


@pytest.mark.parametrize("case", select(data="integer"), ids=lambda case: case.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_integer_cases_are_exact(case: Case, seed: int) -> None:
    inputs = make_inputs(case.with_seed(seed))
    proof = prove(inputs)
    assert max(proof.bits.values()) < 24
    # and the oracle itself is exact: fp32 sums give the same values
    fp64 = forward_backward(inputs)
    fp32 = forward_backward(inputs, dtype=torch.float32)
    for name, tensor in fp64.items():
        assert torch.equal(tensor.float(), fp32[name]), name
        assert torch.equal(tensor.float().double(), tensor), name


@st.composite
def integer_cases(draw: st.DrawFn) -> str:
    ranges = {"E": (1, 9), "k": (1, 4), "H": (1, 80), "I": (1, 80), "T": (0, 50), "r": (1, 40)}
    sizes = {name: draw(st.integers(*ends)) for name, ends in ranges.items()}
    sizes["k"] = min(sizes["k"], sizes["E"])
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    routing = draw(st.sampled_from(["uniform", "zipf", "masked", "one_expert"]))
    alpha = sizes["r"] * 2.0 ** draw(st.integers(-3, 4))
    return f"{text},alpha={alpha},data=integer,routing={routing}@seed={draw(st.integers(0, 1000))}"


@given(integer_cases())
@settings(max_examples=60, deadline=None)
def test_any_integer_case_is_exact(text: str) -> None:
    prove(make_inputs(Case.parse(text)))


def test_integer_results_need_rounding() -> None:
    """Otherwise no test would check the one rounding of a stored result."""
    found = forward_backward(make_inputs(catalogue()["exact_odd"]))
    for name in ("output", "grad_input", "grad_gate_lora_a", "grad_up_lora_a", "grad_down_lora_a"):
        assert bool((found[name].to(torch.bfloat16).double() != found[name]).any()), name


SPOILED: dict[str, tuple[Callable[[Inputs], object], str]] = {
    "a gate half open": (lambda i: i.gate_proj[i.active[0]].zero_(), "neither open nor shut|loses bits"),
    "an up that is no bf16 number": (lambda i: i.up_proj[i.active[0], 0].fill_(7.0), "^(up|h): .*loses bits"),
    "weights that are no powers of two": (lambda i: i.weights.fill_(1 / 3), "weights"),
    "a gradient of many bits": (lambda i: i.grad_output.fill_(255 / 128), "loses bits|add up"),
    "long sums": (lambda i: (i.down_proj.mul_(2.0**12), i.lora["down_lora_b"].mul_(2.0**-12)), "add up|loses bits"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_the_proof_refuses_inexact_data(what: str) -> None:
    spoil, says = SPOILED[what]
    inputs = make_inputs(catalogue()["exact_odd"])
    spoil(inputs)
    with pytest.raises(NotExact, match=says):
        prove(inputs)


def test_gaussian_data_is_not_exact() -> None:
    with pytest.raises(NotExact):
        prove(make_inputs(catalogue()["small"]))
