"""The first document: KTMoEWrapper's unit tests, tensor parallelism, debugging, memory and timing, on small sizes.

docs/from-kt-kernel.md has the table of sections. The documents' own sizes are the case deepseek_v3_t4 of the suites.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ktverify.judge.reference import forward_backward
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import GRAD_NAMES, LORA_NAMES
from tests.support.command_line import call, ends

CASE = Case.parse("E=8,k=2,H=64,I=48,T=4,r=8,alpha=16@seed=11")
# the documents' limits on mean |a - b| / mean |b|
FORWARD_LIMIT, BACKWARD_LIMIT = 0.05, 0.10


def mean_rel(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """mean |a - b| / mean |b|, as the documents compare."""
    return float((actual.double() - expected).abs().mean() / expected.abs().mean())


def create(**changes: Any) -> Any:
    """A wrapper by the documents' call, with the sizes of CASE."""
    from kt_kernel.experts import KTMoEWrapper  # type: ignore[import-not-found]

    arguments = {
        "layer_idx": 0,
        "num_experts": CASE.num_experts,
        "num_experts_per_tok": CASE.top_k,
        "hidden_size": CASE.hidden,
        "moe_intermediate_size": CASE.intermediate,
        "num_gpu_experts": 0,
        "cpuinfer_threads": 60,
        "threadpool_count": 1,
        "weight_path": "",
        "chunked_prefill_size": 25600,
        "method": "AMXBF16_SFT",
        "mode": "sft",
        "lora_rank": CASE.rank,
        "lora_alpha": CASE.alpha,
    }
    return KTMoEWrapper(**{**arguments, **changes})


def initialised(inputs: Inputs, **changes: Any) -> Any:
    wrapper = create(**changes)
    physical_map = torch.arange(CASE.num_experts, dtype=torch.int64, device="cpu")
    wrapper.load_weights_from_tensors(inputs.gate_proj, inputs.up_proj, inputs.down_proj, physical_map)
    wrapper.init_lora_weights(*(inputs.lora[name].clone() for name in LORA_NAMES))
    return wrapper


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(CASE)


@pytest.fixture(scope="module")
def right(inputs: Inputs) -> dict[str, torch.Tensor]:
    return forward_backward(inputs)


def batch(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs.hidden_states, inputs.expert_ids, inputs.weights


# ---- 1 unit tests


def test_1_1_forward_accuracy(inputs: Inputs, right: dict[str, torch.Tensor]) -> None:
    output = initialised(inputs).forward_sft(*batch(inputs), save_for_backward=False)
    assert mean_rel(output, right["output"]) < FORWARD_LIMIT


def test_1_2_backward_accuracy(inputs: Inputs, right: dict[str, torch.Tensor]) -> None:
    wrapper = initialised(inputs)
    wrapper.forward_sft(*batch(inputs), save_for_backward=True)
    grad_input, grad_loras = wrapper.backward(inputs.grad_output)
    assert list(grad_loras) == list(GRAD_NAMES)
    for name, gradient in {"grad_input": grad_input, **grad_loras}.items():
        assert mean_rel(gradient, right[name]) < BACKWARD_LIMIT, name


def test_1_3_training_loop(inputs: Inputs) -> None:
    """Three steps, as in the document, and what it does not ask: the engine computes with the new values."""
    wrapper = initialised(inputs)
    parameters = [getattr(wrapper, name) for name in LORA_NAMES]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    before = [parameter.clone() for parameter in parameters]
    first = wrapper.forward_sft(*batch(inputs), save_for_backward=False)
    for _ in range(3):
        output = wrapper.forward_sft(*batch(inputs), save_for_backward=True)
        _, grad_loras = wrapper.backward(torch.ones_like(output) / output.numel())
        for name, parameter in zip(LORA_NAMES, parameters, strict=True):
            parameter.grad = grad_loras[f"grad_{name}"]
        optimizer.step()
        wrapper.update_lora_weights()
        optimizer.zero_grad()
    assert not any(torch.allclose(old, new) for old, new in zip(before, parameters, strict=True))
    last = wrapper.forward_sft(*batch(inputs), save_for_backward=False)
    assert last.float().mean() < first.float().mean()
    trained = replace(inputs, lora={name: getattr(wrapper, name) for name in LORA_NAMES})
    assert mean_rel(last, forward_backward(trained, backward=False)["output"]) < FORWARD_LIMIT


# ---- 2 tensor parallelism


@pytest.mark.parametrize("degree", [1, 4])
def test_2_1_and_2_2_a_layer_without_and_with_tensor_parallelism(
    inputs: Inputs, right: dict[str, torch.Tensor], degree: int
) -> None:
    wrapper = initialised(inputs, threadpool_count=degree)
    output = wrapper.forward_sft(*batch(inputs), save_for_backward=True)
    _, grad_loras = wrapper.backward(inputs.grad_output)
    assert mean_rel(output, right["output"]) < FORWARD_LIMIT
    assert all(mean_rel(grad_loras[name], right[name]) < BACKWARD_LIMIT for name in GRAD_NAMES)


def test_2_3_and_5_3_a_degree_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RuntimeError) as raised:
        create(moe_intermediate_size=49, threadpool_count=4)
    assert "For TP, intermediate_size (49) must be a multiple of threadpool_count (4)" in str(raised.value)
    # the document's check prints the degrees that would work; here the error names them
    degrees = [int(number) for number in re.findall(r"\d+", str(raised.value).partition("(4)")[2])]
    assert degrees
    assert not [degree for degree in degrees if 49 % degree]


def test_2_4_degrees_agree(inputs: Inputs) -> None:
    """In one process: a second degree needs no new one here."""
    alone, parts = (
        initialised(inputs, threadpool_count=degree).forward_sft(*batch(inputs), save_for_backward=False)
        for degree in (1, 4)
    )
    torch.testing.assert_close(alone, parts, rtol=2**-7, atol=1e-3)


# ---- 5 finding mistakes


def find_nan(wrapper: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, folder: Path) -> str:
    """Where NaN appears first: input, output, or the name of a gradient; "" for nowhere. Inputs of a bad output are
    kept in `folder`."""
    if not hidden.isfinite().all():
        return "input"
    output = wrapper.forward_sft(hidden, ids, weights, save_for_backward=True)
    if output.isnan().any():
        torch.save(
            {"hidden_states": hidden, "expert_ids": ids, "weights": weights, "output": output}, folder / "nan.pt"
        )
        return "output"
    _, grad_loras = wrapper.backward(torch.ones_like(output))
    return next((name for name, gradient in grad_loras.items() if gradient.isnan().any()), "")


def test_5_1_nan_is_found_where_it_begins(inputs: Inputs, tmp_path: Path) -> None:
    hidden, ids, weights = batch(inputs)
    assert find_nan(initialised(inputs), hidden, ids, weights, tmp_path) == ""
    bad = hidden.clone()
    bad[1, 3] = torch.nan
    assert find_nan(initialised(inputs), bad, ids, weights, tmp_path) == "input"
    wrapper = initialised(inputs)
    wrapper.down_lora_b[int(ids[0, 0]), 0, 0] = torch.nan
    wrapper.update_lora_weights()
    assert find_nan(wrapper, hidden, ids, weights, tmp_path) == "output"
    assert torch.load(tmp_path / "nan.pt")["output"].isnan().any()


def test_5_2_a_wrong_scaling_shows_in_every_gradient(inputs: Inputs, right: dict[str, torch.Tensor]) -> None:
    """The document's comparison, gradient by gradient, on a right layer and on one with another alpha."""

    def worst(**changes: Any) -> dict[str, float]:
        wrapper = initialised(inputs, **changes)
        wrapper.forward_sft(*batch(inputs), save_for_backward=True)
        _, grad_loras = wrapper.backward(inputs.grad_output)
        return {name: mean_rel(gradient, right[name]) for name, gradient in grad_loras.items()}

    assert max(worst().values()) < BACKWARD_LIMIT
    assert min(worst(lora_alpha=2 * CASE.alpha).values()) > BACKWARD_LIMIT


def test_5_2_a_backward_without_a_saved_forward_says_so(inputs: Inputs) -> None:
    wrapper = initialised(inputs)
    wrapper.forward_sft(*batch(inputs), save_for_backward=False)
    with pytest.raises(RuntimeError, match="forward_sft"):
        wrapper.backward(inputs.grad_output)


def test_5_4_memory_is_cleaned_and_no_result_changes(inputs: Inputs) -> None:
    from kt_kernel.experts import KTMoEWrapper

    wrapper = initialised(inputs)
    before = wrapper.forward_sft(*batch(inputs), save_for_backward=True)
    KTMoEWrapper.clear_sft_buffer_cache()
    gc.collect()
    torch.cuda.empty_cache()
    _, grad_loras = wrapper.backward(inputs.grad_output)  # a saved forward stays
    assert all(gradient.isfinite().all() for gradient in grad_loras.values())
    assert torch.equal(wrapper.forward_sft(*batch(inputs), save_for_backward=False), before)


# ---- 6 times


def milliseconds(run: Callable[[], Any], iterations: int = 3, warmup: int = 1) -> tuple[float, list[Any]]:
    """Milliseconds of an iteration, and all results."""
    results = [run() for _ in range(warmup)]
    start = time.perf_counter()
    results += [run() for _ in range(iterations)]
    return (time.perf_counter() - start) / iterations * 1000, results


def test_6_1_to_6_3_timed_calls_give_the_same_bits(inputs: Inputs) -> None:
    """No time is asserted: `ktverify bench layer` measures. That every timed call computes is."""

    def both(wrapper: Any) -> torch.Tensor:
        wrapper.forward_sft(*batch(inputs), save_for_backward=True)
        found: torch.Tensor = wrapper.backward(inputs.grad_output)[1]["grad_down_lora_a"]
        return found

    for degree in (1, 4):
        wrapper = initialised(inputs, threadpool_count=degree)
        runs = (lambda w=wrapper: w.forward_sft(*batch(inputs), save_for_backward=False), lambda w=wrapper: both(w))
        for run in runs:
            took, results = milliseconds(run)
            assert took > 0
            assert all(torch.equal(results[0], result) for result in results[1:])


# ---- 4.3 the command line


@pytest.mark.parametrize(
    ("case", "options"),
    [(CASE.id, "--mode forward --method AMXBF16_SFT --tp no-tp"), ("small", "--mode backward --tp tp")],
)
def test_4_3_the_documents_options_work(case: str, options: str) -> None:
    assert "PASS" in ends(call("verify", "--case", case, *options.split()), 0)
