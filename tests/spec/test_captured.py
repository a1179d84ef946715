"""The file of a captured call: what is in it, what comes back, and which files are refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ktverify.spec.captured import Captured, inputs_of, read, write
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs

CASE = Case.parse("E=6,k=2,H=64,I=96,T=5,r=4,alpha=8,lora=float32@seed=3")
IDS = torch.tensor([[0, 5], [3, -1], [0, 1], [-1, -1], [5, 0]])
WEIGHTS = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
CALL = Captured(CASE, 7, 12, IDS, WEIGHTS, {"hidden_states": 5.9, "grad_output": 3e-4})


def test_a_call_comes_back(tmp_path: Path) -> None:
    path = write(CALL, tmp_path / "new" / "folder")
    assert path.name == "layer007_call000012.safetensors"
    found = read(path)
    assert (found.case.id, found.layer, found.call, found.spread) == (CASE.id, 7, 12, CALL.spread)
    assert torch.equal(found.expert_ids, IDS)
    assert torch.equal(found.weights, WEIGHTS)
    assert found.tensors == {}


def test_a_file_has_no_token_unless_asked(tmp_path: Path) -> None:
    with safe_open(write(CALL, tmp_path), "pt") as file:
        assert sorted(file.keys()) == ["expert_ids", "weights"]
    tokens = {name: torch.randn(5, 64).bfloat16() for name in ("hidden_states", "grad_output")}
    found = read(write(replace(CALL, tensors=tokens), tmp_path))
    assert all(torch.equal(found.tensors[name], tokens[name]) for name in tokens)
    inputs = inputs_of(found)
    assert torch.equal(inputs.hidden_states, tokens["hidden_states"])
    assert torch.equal(inputs.grad_output, tokens["grad_output"])


def test_inputs_have_the_routing_and_the_spread_of_the_call() -> None:
    inputs, plain = inputs_of(CALL), make_inputs(CASE)
    assert torch.equal(inputs.expert_ids, IDS)
    assert torch.equal(inputs.weights, WEIGHTS)
    assert inputs.active == [0, 1, 3, 5]
    # 5.9 and 3e-4, to the nearest power of two, so that every bf16 stays one
    assert torch.equal(inputs.hidden_states, plain.hidden_states * 8)
    assert torch.equal(inputs.grad_output, plain.grad_output * 2.0**-12)
    assert bool(inputs.gate_proj[3].any())
    assert not bool(inputs.gate_proj[2].any())


@pytest.mark.parametrize("spread", [0.0, float("nan"), float("inf")])
def test_a_spread_that_is_no_number_scales_nothing(spread: float) -> None:
    inputs = inputs_of(replace(CALL, spread={"hidden_states": spread}))
    assert torch.equal(inputs.hidden_states, make_inputs(CASE).hidden_states)


def with_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(tensors: dict[str, Any], about: dict[str, str]) -> None:
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor

    return change


def with_word(name: str, word: str | None) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(tensors: dict[str, Any], about: dict[str, str]) -> None:
        about.pop(name, None)
        if word is not None:
            about[name] = word

    return change


REFUSED = {
    "no captured call": (with_word("ktverify_captured", None), "no captured call of format 1"),
    "a later format": (with_word("ktverify_captured", "2"), "no captured call of format 1"),
    "no case": (with_word("case", None), "it lacks 'case'"),
    "a case that is none": (with_word("case", "E=0,k=1,H=1,I=1,T=1,r=1"), "E (num_experts) is 0"),
    "a case without end": (with_word("case", f"E=4,k=2,H={10**9},I=96,T=5,r=4"), "those of no layer"),
    "a layer that is no number": (with_word("layer", "x"), "invalid literal"),
    "no routing": (with_tensor("expert_ids", None), "expert_ids"),
    "another dtype": (with_tensor("expert_ids", IDS), "it takes torch.int32 [5, 2]"),
    "another shape": (with_tensor("weights", WEIGHTS[:4].clone()), "weights is torch.float32 [4, 2]"),
    "an expert beyond the last": (with_tensor("expert_ids", (IDS + 1).int()), "expert_ids go from 0 to 6"),
    "weights that are NaN": (with_tensor("weights", WEIGHTS * float("nan")), "weights are not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, says = REFUSED[name]
    tensors: dict[str, Any] = {"expert_ids": IDS.int(), "weights": WEIGHTS.clone()}
    about = {"ktverify_captured": "1", "case": CASE.id, "layer": "7", "call": "12"}
    change(tensors, about)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, about)
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        read(path)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write(CALL, tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read(path)
    with pytest.raises(FileNotFoundError, match="no captured call at"):
        read(tmp_path / "none")
