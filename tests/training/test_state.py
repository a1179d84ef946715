"""A wrapped model's state_dict: it takes its own strictly, and says what is wrong with another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ktverify.training.tiny import build_model
from tests.support import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FAMILY = "qwen3_moe"
IDS = models.token_ids(4, 17)


def engine_model() -> Any:
    return models.with_engine(build_model(FAMILY).float())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_a_model_takes_its_own_state_strictly() -> None:
    model, other = (models.adapted(engine_model(), seed=seed) for seed in (3, 4))
    expected = logits(model)
    assert not torch.equal(logits(other), expected)
    assert not any(other.load_state_dict(model.state_dict(), strict=True))
    assert torch.equal(logits(other), expected)


def test_a_state_that_is_another_models_is_refused() -> None:
    bare = engine_model()
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj is in the state, but the engine has these weights"):
        bare.load_state_dict(build_model(FAMILY).float().state_dict())
    state = bare.state_dict()
    state.pop("lm_head.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
        bare.load_state_dict(state)
