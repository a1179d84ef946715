"""Tiny models of every family: pairs of stock and engine with equal weights and adapters, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ktverify.judge.gates import tolerances
from ktverify.judge.metrics import compare
from ktverify.training import add_adapter, init_cpu_infer, lora_config, wrap_moe_layers
from ktverify.training.tiny import build_model
from ktverify.training.wrap import find_experts

RANK = 4
PEER = "ktverify_suites_bf16"


def token_ids(rows: int = 2, length: int = 19, seed: int = 5) -> Tensor:
    """[rows, length] int64 below the tiny models' vocabulary."""
    return torch.randint(6, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def fill(model: Any, seed: int = 3, scale: float = 0.1) -> Any:
    """`model` with every trainable parameter drawn anew, the same for equal names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def with_engine(model: Any, *, depth: int = 4, tp: int = 1, auto_update: bool = True) -> Any:
    """`model` itself, with its experts in the engine."""
    return wrap_moe_layers(model, init_cpu_infer(2, tp, max_cache_depth=depth), auto_update=auto_update)


def with_peer(model: Any) -> Any:
    """`model` with its experts in plain bf16 torch, whose error the budgets are multiples of."""
    ALL_EXPERTS_FUNCTIONS.register(PEER, _plain_bf16)
    return choose_experts(model, PEER)


def choose_experts(model: Any, implementation: str) -> Any:
    """`model` with this implementation of experts. The model's own method takes transformers' names alone in 5.6."""
    for block in find_experts(model):
        block.config._experts_implementation = implementation  # type: ignore[union-attr]
    return model


def adapted(model: Any, *, seed: int = 3, **settings: Any) -> Any:
    """`model` with a filled adapter of rank RANK on attention and experts."""
    return fill(add_adapter(model, lora_config(model, **{"rank": RANK, **settings})), seed)


def eager(family: str) -> Any:
    """The stock model in fp32, its experts one after the other."""
    return choose_experts(build_model(family).float(), "eager")


def trio(family: str) -> tuple[Any, Any, Any]:
    """(stock in fp32, the same with the engine, the same with plain bf16 experts), filled adapters on all."""
    stock = eager(family)
    engine = adapted(with_engine(copy.deepcopy(stock)))
    stock = adapted(stock)
    return stock, engine, with_peer(copy.deepcopy(stock))


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of all trainable parameters by name; AssertionError for one without."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient for {missing[0]}"
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def forward_backward(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """logits, and the gradients of one backward of the loss."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return {"logits": out.logits.detach(), **gradients(model)}


def budget_beside(plain: float) -> float:
    """The rel_l2 that a model may have where the same model in plain bf16 torch has `plain`: 1.5 times that."""
    return max(float(tolerances()["training"]["factor"]) * plain, float(tolerances()["rounding"]["floor"]))


def expect_within_budget(actual: dict[str, Tensor], expected: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    """AssertionError unless every tensor's rel_l2 is within the budget that the peer's error gives."""
    assert actual.keys() == expected.keys()
    for name in expected:
        error, allowed = compare(actual[name], expected[name]).rel_l2, compare(peer[name], expected[name]).rel_l2
        budget = budget_beside(allowed)
        assert float(expected[name].norm()) > 0, f"{name} is all zero"
        assert error <= budget, f"{name} rel_l2 {error:.2e}, budget {budget:.2e}"


@contextmanager
def routing_of(model: Any, into: list[Tensor]) -> Iterator[None]:
    """Inside, append the expert_ids of every block of experts to `into`."""

    def collect(module: Any, inputs: tuple[Tensor, ...]) -> None:
        into.append(inputs[1].sort(dim=-1).values)

    hooks = [block.register_forward_pre_hook(collect) for block in find_experts(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _plain_bf16(block: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts as a torch user writes them in bf16: every operand and every result rounded."""
    x, weights = hidden_states.bfloat16(), top_k_weights.bfloat16()
    gate_up, down = block.gate_up_proj.bfloat16(), block.down_proj.bfloat16()
    output = torch.zeros_like(x)
    for expert in torch.unique(top_k_index).tolist():
        rows, slots = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[expert])
        output = output.index_add(0, rows, y * weights[rows, slots, None])
    return output.to(hidden_states.dtype)
