"""torch.compile of a wrapped model: the losses and gradients of the same model without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.training.tiny import build_model
from tests.support import models

# torch.compile warns of its own parts
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
IDS = models.token_ids(4, 17)
COMPILER = [{"backend": "eager"}, {"backend": "aot_eager"}, {"backend": "eager", "dynamic": True}, {}]


compiled: Any = torch.compile
traced: Any = torch.jit.trace


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def make() -> Any:
    return models.adapted(models.with_engine(build_model("qwen3_moe", sizes={"num_hidden_layers": 1}).float()))


def trained(model: Any, call: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps, and the gradients of the first."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        loss = call(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss))
        first = first or models.gradients(model)
        optimizer.step()
    return losses, first


@pytest.mark.parametrize("options", COMPILER, ids=str)
def test_losses_and_gradients_are_those_without_compilation(options: dict[str, Any]) -> None:
    plain, model = make(), make()
    (losses, gradients), (expected, wanted) = trained(model, compiled(model, **options)), trained(plain, plain)
    # inductor rounds in other places; the others compute the same calls
    exact = "backend" in options
    assert losses == expected if exact else losses == pytest.approx(expected, rel=1e-3)
    for name in wanted:
        apart = float((gradients[name] - wanted[name]).norm() / wanted[name].norm())
        assert apart <= (0 if exact else 2e-2), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: Any) -> None:
    model = make()
    with mode():
        expected = model(input_ids=IDS).logits
        assert torch.equal(compiled(model, backend="aot_eager")(input_ids=IDS).logits, expected)


def test_a_compiled_optimizer_step_is_seen() -> None:
    model = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.autograd.backward(model(input_ids=IDS, labels=IDS).loss)
    compiled(optimizer.step, backend="eager")()
    fresh = make()
    fresh.load_state_dict({name: p for name, p in model.state_dict().items() if "lora" in name}, strict=False)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, fresh(input_ids=IDS).logits)


def test_a_whole_graph_is_refused_in_words() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"outside of torch.*leave fullgraph=True out"):
        compiled(make(), backend="eager", fullgraph=True)(input_ids=IDS)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_refused_in_words() -> None:
    # it would hold this call's results as constants
    # the experts alone: some releases of transformers cannot trace their own mask
    experts = make()._kt_wrappers[0]
    slots = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record"):
        traced(experts, (torch.zeros(4, experts.hidden_size), *slots), strict=False)
