"""Gradients in any order: accumulation, several saved forwards, checkpointing, freed graphs, stale LoRA."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.training.factors import engine_lora
from ktverify.training.tiny import build_model
from tests.support import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FAMILY = "qwen3_moe"
IDS = models.token_ids(8, 17)


def make(**options: Any) -> Any:
    return models.adapted(models.with_engine(build_model(FAMILY).float(), **options))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def waiting(model: Any) -> int:
    return sum(int(wrapper.engine.saved_forwards) for wrapper in model._kt_wrappers)


def gradients_of(model: Any, *losses: Tensor) -> dict[str, Tensor]:
    """All gradients of the model after one backward of each loss."""
    for loss in losses:
        torch.autograd.backward(loss)
    return models.gradients(model)


def one_by_one(*batches: Tensor) -> dict[str, Tensor]:
    """All gradients of a new model after a forward and backward of each batch."""
    model = make()
    for ids in batches:
        torch.autograd.backward(loss_of(model, ids))
    return models.gradients(model)


def expect_close(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        apart = float((actual[name] - expected[name]).norm() / expected[name].norm())
        assert apart <= limit, f"{name} differs by {apart:.2e}"


def expect_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(actual[name], expected[name]) for name in expected | actual)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Gradients of all eight rows in one backward."""
    return one_by_one(IDS)


@pytest.mark.parametrize("parts", [4, 8])
def test_accumulation(parts: int, expected: dict[str, Tensor]) -> None:
    model = make()
    for rows in IDS.chunk(parts):
        torch.autograd.backward(loss_of(model, rows) / parts)
    # only roundings of single rows to bf16 differ: upstream gradients are not the same bits in another batch
    expect_close(models.gradients(model), expected, 5e-3)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards(order: tuple[int, int]) -> None:
    model, halves = make(), IDS.chunk(2)
    losses = [loss_of(model, half) for half in halves]
    assert waiting(model) == 4
    found = gradients_of(model, *(losses[place] for place in order))
    expect_same(found, one_by_one(*(halves[place] for place in order)))
    assert waiting(model) == 0


def test_one_backward_of_two_forwards() -> None:
    model, halves = make(), IDS.chunk(2)
    found = gradients_of(model, loss_of(model, halves[0]) + loss_of(model, halves[1]))
    expect_close(found, one_by_one(*halves), 1e-6)


def test_more_forwards_than_the_engine_keeps() -> None:
    found = []
    for depth, kept in ((8, 8), (1, 2)):
        model = make(depth=depth)
        losses = [loss_of(model, rows) for rows in IDS.chunk(4)]
        assert waiting(model) == kept
        found.append(gradients_of(model, *losses))
    expect_same(*found)


def test_a_graph_that_is_used_twice() -> None:
    model = make()
    loss = loss_of(model, IDS)
    torch.autograd.backward(loss, retain_graph=True)
    expect_same(gradients_of(model, loss), one_by_one(IDS, IDS))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, expected: dict[str, Tensor]) -> None:
    model = make()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    loss = loss_of(model, IDS)
    assert waiting(model) == 0, "a checkpointed forward keeps nothing in the engine"
    expect_same(gradients_of(model, loss), expected)
    assert waiting(model) == 0


def test_a_freed_graph_frees_the_engines_memory() -> None:
    model = make()
    loss = loss_of(model, IDS)
    assert waiting(model) == 2
    del loss
    gc.collect()
    assert waiting(model) == 0
    with torch.no_grad():
        loss_of(model, IDS)
    assert waiting(model) == 0


# ---- the engine computes with the optimizer's parameters


def step(model: Any, kind: str = "AdamW", **options: Any) -> None:
    """A backward, and a step of a new optimizer."""
    torch.autograd.backward(loss_of(model, IDS))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    getattr(torch.optim, kind)(parameters, lr=1e-2, **options).step()


def expect_present_lora(model: Any) -> None:
    """The model computes like a fresh one with the same parameters."""
    fresh = make()
    fresh.load_state_dict({n: p for n, p in model.state_dict().items() if "lora" in n}, strict=False)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, fresh(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("kind", "options"),
    # fused moves no version counter
    [("AdamW", {"foreach": False}), ("AdamW", {"foreach": True}), ("AdamW", {"fused": True}), ("SGD", {})],
)
def test_an_optimizer_step_needs_no_call(kind: str, options: dict[str, Any]) -> None:
    model = make()
    before = model(input_ids=IDS).logits.detach()
    step(model, kind, **options)
    expect_present_lora(model)
    assert not torch.equal(before, model(input_ids=IDS).logits)


def _by_another_process(parameter: Tensor) -> None:
    parameter.data.share_memory_()  # type: ignore[no-untyped-call]
    child = os.fork()
    if child == 0:
        parameter.data.view(-1)[-1] += 1
        os._exit(0)
    os.waitpid(child, 0)


def _by_numpy(parameter: Tensor) -> None:
    parameter.detach().numpy().reshape(-1)[7] += 1


def _another_sign_of_zero(parameter: Tensor) -> None:
    parameter.data.view(-1)[3] = -0.0


def _foreach(parameter: Tensor) -> None:
    torch._foreach_add_([parameter.data.view(-1)[5:6]], 1)


def _untyped_storage(parameter: Tensor) -> None:
    other = torch.full_like(parameter.data, 0.25)
    parameter.data.untyped_storage().copy_(other.untyped_storage())


def _swapped(parameter: Tensor) -> None:
    # refused for a parameter that a weak reference leads to
    swap: Any = torch.utils.swap_tensors
    swap(parameter, torch.nn.Parameter(parameter.detach() * 1.5))


# each changes a parameter, most of them one element, and none moves autograd's counter of it
WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda p: p.data.view(-1)[1:2].sub_(0.5),
    "the last element": lambda p: p.data.view(-1)[-1:].add_(1),
    "one expert of B": lambda p: p.data.view(p.shape[0], -1)[:, 3::8].mul_(1.5),
    "set_": torch.no_grad()(lambda p: p.set_(p.data * 1.25)),
    "another storage": lambda p: setattr(p, "data", p.data * 1.25),
    "two elements swapped": lambda p: p.data.view(-1)[:2].copy_(p.data.view(-1)[:2].flip(0)),
    "all signs": lambda p: p.data.neg_(),
    "numpy": _by_numpy,
    "foreach": _foreach,
    "storage": _untyped_storage,
    "another process": _by_another_process,
    "swap_tensors": _swapped,
    "the sign of a zero": _another_sign_of_zero,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_no_counter_shows_is_detected(writer: str) -> None:
    model, strict = make(), make(auto_update=False)
    for one in (model, strict):
        one(input_ids=IDS)
    for name in model._kt_wrappers[0].lora_params:
        for one in (model, strict):
            parameter = one._kt_wrappers[0].lora_params[name]
            WRITERS[writer](parameter)
        with pytest.raises(RuntimeError, match="changed since the engine took them over"), torch.no_grad():
            strict(input_ids=IDS)
        strict._kt_wrappers[0].update_lora_pointers()
        expect_present_lora(model)
        expect_present_lora(strict)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("later", [0, 7])
def test_a_write_to_an_expert_that_is_reached_later_is_detected(writer: str, later: int) -> None:
    """In each way: tokens on other experts, a write, tokens on other experts, tokens on the changed expert."""
    experts = make()._kt_wrappers[0].num_experts
    others = [e for e in range(experts) if e != later]

    def compute(model: Any, expert_ids: list[int]) -> Tensor:
        """One call of the first layer's experts, one token for each id, forward and backward."""
        block, wrapper = model.base_model.model.model.layers[0].mlp.experts, model._kt_wrappers[0]
        x = torch.randn(len(expert_ids), wrapper.hidden_size, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        output: Tensor = block(x, torch.tensor(expert_ids)[:, None], torch.ones(len(expert_ids), 1))
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        return torch.cat([output.detach(), gradient])

    model, strict = make(), make(auto_update=False)
    for one in (model, strict):
        compute(one, others)
        for parameter in one._kt_wrappers[0].lora_params.values():
            WRITERS[writer](parameter)
    with pytest.raises(RuntimeError, match="changed since the engine took them over"):
        compute(strict, [later])
    strict._kt_wrappers[0].update_lora_pointers()
    fresh = make()
    fresh.load_state_dict({n: p for n, p in model.state_dict().items() if "lora" in n}, strict=False)
    wanted = compute(fresh, [later])
    compute(model, others)
    for one in (model, strict):
        assert torch.equal(compute(one, [later]), wanted)


CONVERTED = "ktverify.training.layer.engine_lora"


def halved(model: Any) -> Any:
    """`model` with half the scaling, so that the engine's B is a product of the parameter."""
    with torch.no_grad():
        model(input_ids=IDS)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    return model


def test_a_write_while_the_values_are_taken_over_is_found_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(make())

    def written(*given: Any) -> list[Tensor]:
        values = engine_lora(*given)
        monkeypatch.setattr(CONVERTED, engine_lora)
        for parameter in model._kt_wrappers[0].lora_params.values():
            parameter.data.view(-1)[5] += 1
        return values

    monkeypatch.setattr(CONVERTED, written)
    fresh = make()
    with torch.no_grad():
        model(input_ids=IDS)
        found = model(input_ids=IDS).logits
        fresh.load_state_dict({n: p for n, p in model.state_dict().items() if "lora" in n}, strict=False)
        assert torch.equal(found, halved(fresh)(input_ids=IDS).logits)


def test_values_that_the_engine_has_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(make())
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        monkeypatch.setattr(CONVERTED, None)
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_training_without_counters_equals_training_with_them() -> None:
    losses: list[list[float]] = []
    for through_data in (True, False):
        model, curve = make(), []
        parameters = [p for p in model.parameters() if p.requires_grad]
        for _ in range(4):
            model.zero_grad()
            loss = loss_of(model, IDS)
            torch.autograd.backward(loss)
            curve.append(float(loss.detach()))
            with torch.no_grad():
                for p in parameters:
                    if through_data:
                        p.data -= 0.5 * p.grad
                    else:
                        p -= 0.5 * p.grad
        losses.append(curve)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_stale_lora_is_refused_where_updates_are_off() -> None:
    model = make(auto_update=False)
    model(input_ids=IDS)
    step(model, fused=True)
    with pytest.raises(RuntimeError, match=r"changed since the engine took them over.*update_lora_pointers\(\)"):
        model(input_ids=IDS)
    for wrapper in model._kt_wrappers:
        wrapper.update_lora_pointers()
    expect_present_lora(model)


def test_disabling_adapters_and_other_optimizers_are_no_change() -> None:
    model, plain = make(auto_update=False), make()
    for wrapper in model._kt_wrappers:
        wrapper.update_lora_pointers()  # before the first forward: nothing to do yet
    loss, twin = loss_of(model, IDS), loss_of(plain, IDS)
    for one in (loss, twin):
        torch.autograd.backward(one, retain_graph=True)
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.AdamW([other], fused=True).step()
    with torch.no_grad():
        on = model(input_ids=IDS).logits
        with model.disable_adapter():
            off = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, on)
    assert not torch.equal(on, off)
    # the graph is used again with the values of its forward
    for one in (loss, twin):
        torch.autograd.backward(one)
    expect_same(models.gradients(model), models.gradients(plain))


def test_a_step_while_the_adapter_is_off_is_a_change() -> None:
    model = make(auto_update=False)
    torch.autograd.backward(loss_of(model, IDS))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=IDS)
        optimizer.step()
        model(input_ids=IDS)
    with pytest.raises(RuntimeError, match="changed since the engine took them over"):
        model(input_ids=IDS)


def test_optimizers_of_fake_and_sparse_tensors_are_ignored() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        other = torch.nn.Parameter(torch.ones(3))
        other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1, foreach=False).step()
    sparse = torch.nn.Parameter(torch.eye(2).to_sparse())
    torch.optim.SGD([sparse], lr=0.1, foreach=False).step()


def double_lora(model: Any, *names: str) -> None:
    """Change the parameters of those names, or all, and let the engine take the new values over."""
    with torch.no_grad():
        for wrapper in model._kt_wrappers:
            for name in names or wrapper.lora_params:
                wrapper.lora_params[name].data.mul_(2)
        model(input_ids=IDS)


def test_backward_after_a_step_uses_the_lora_of_its_forward(expected: dict[str, Tensor]) -> None:
    model = make()
    loss = loss_of(model, IDS)
    double_lora(model)
    found = gradients_of(model, loss)
    name = next(name for name in found if "layers.1.mlp.experts.lora_B" in name)
    assert torch.equal(found[name], expected[name])


def test_a_repeated_forward_needs_its_lora() -> None:
    model = make(depth=1)
    losses = [loss_of(model, rows) for rows in IDS.chunk(2)]
    double_lora(model, "down_lora_b")
    with pytest.raises(RuntimeError, match="the LoRA weights have changed since; raise max_cache_depth"):
        torch.autograd.backward(losses[1])


def test_threads_that_share_a_model_get_what_they_would_get_alone() -> None:
    alone = make()
    with torch.no_grad():
        expected = [alone(input_ids=rows).logits for rows in IDS.chunk(4)]
    model = make()  # its first forward, which builds the engines, is one of these

    def compute(place: int) -> bool:
        rows = IDS.chunk(4)[place]
        with torch.no_grad():
            return all(torch.equal(model(input_ids=rows).logits, expected[place]) for _ in range(6))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(4)))


def test_gradients_of_threads_that_share_a_model() -> None:
    alone, shared = make(depth=1), make(depth=1)
    shared(input_ids=IDS)
    losses = [loss_of(alone, rows) for rows in IDS.chunk(4)]
    wanted = [torch.autograd.grad(loss, [p for p in alone.parameters() if p.requires_grad]) for loss in losses]

    def compute(place: int) -> bool:
        rows, parameters = IDS.chunk(4)[place], [p for p in shared.parameters() if p.requires_grad]
        found = [torch.autograd.grad(loss_of(shared, rows), parameters) for _ in range(4)]
        return all(torch.equal(f, w) for one in found for f, w in zip(one, wanted[place], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(4)))
    assert waiting(shared) == 0
