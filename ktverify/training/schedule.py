"""The learning rate of each step, as transformers' scheduler gives it: known before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType

from ktverify.training.config import TrainConfig

# they follow the loss of evaluations, of which there are none
_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
_SAMPLES = 64  # steps at which a schedule is checked


def check_schedule(config: TrainConfig, total: int) -> None:
    """ValueError, in one line, for a schedule that a training of `total` steps could not use."""
    rate = learning_rates(config, total)
    for step in {*range(0, total, max(1, total // _SAMPLES)), total}:
        try:
            found = float(rate(step))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(_text(config, error)) from None
        if not (math.isfinite(found) and found >= 0):
            raise ValueError(_text(config, f"step {step} would have the learning rate {found}"))


def learning_rates(config: TrainConfig, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the steps done, in a training of `total` steps. ValueError for an unknown
    scheduler, and for one that lacks arguments."""
    name = config.lr_scheduler_type
    known = [kind.value for kind in SchedulerType if kind.value not in _BY_EVALUATION]
    if name in _BY_EVALUATION:
        raise ValueError(f"lr_scheduler_type {name} needs evaluations, and there are none; it takes {', '.join(known)}")
    if name not in known:
        raise ValueError(f"lr_scheduler_type is {name!r}, it takes one of {', '.join(known)}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        made = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=config.warmup_steps or math.ceil(total * config.warmup_ratio),
            num_training_steps=total,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(_text(config, error)) from None
    return lambda step: float(config.learning_rate * made.lr_lambdas[0](step))


def _text(config: TrainConfig, error: object) -> str:
    given = "" if not config.lr_scheduler_kwargs else f" with lr_scheduler_kwargs {config.lr_scheduler_kwargs}"
    return (
        f"lr_scheduler_type {config.lr_scheduler_type}{given} cannot be used: {' '.join(str(error).split())}; its "
        "arguments are given as lr_scheduler_kwargs: {NAME: NUMBER}"
    )
