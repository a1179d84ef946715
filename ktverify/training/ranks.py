"""The processes of one training whose experts are divided: their group, what they agree on, and each one's rows.

To transformers and accelerate every rank is alone: it has the batches, counts and schedule of the whole training, and
no DistributedDataParallel. Each rank computes its rows of a batch; gradients and losses are added over the ranks here.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ktverify.engines.expert_parallel import Ranks
from ktverify.errors import NotFinite, RankLost, one_line
from ktverify.training import capture
from ktverify.training.adapter import ParamWrapper, cut_state, whole_state_of
from ktverify.training.config import TrainConfig
from ktverify.training.dataset import IGNORED
from ktverify.training.wrap import PROCESS_COUNTS, process_count, require_one_process

# by which torchrun tells a process of the others
_GIVEN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# and by which libraries know that a process is one of several
_HIDDEN = (*PROCESS_COUNTS, *_GIVEN, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")


@contextmanager
def ranks_of(config: TrainConfig) -> Iterator[Ranks | None]:
    """The ranks of a training; None where it is one process. Inside, only rank 0 prints.

    ValueError: there are several processes and no kt_ep; torchrun did not start this one; it does not reach the
    others; or a key does not go together with kt_ep."""
    if not config.kt_ep:
        require_one_process()
        yield None
        return
    _check_keys(config)
    if process_count() == 1:
        yield None
        return
    with ExitStack() as ends:
        if not dist.is_initialized():
            missing = [name for name in _GIVEN if name not in os.environ]
            if missing:
                raise ValueError(
                    f"kt_ep: true takes processes that torchrun started, and {missing[0]} is not set: torchrun "
                    "--nproc-per-node N -m ktverify train CONFIG.yaml --kt_ep true"
                )
            timeout = datetime.timedelta(seconds=config.kt_ep_timeout)
            try:
                # gloo also where there is a GPU: the experts' rows are computed on the CPU
                dist.init_process_group("gloo", timeout=timeout)
            except (RuntimeError, ValueError) as error:
                given = ", ".join(f"{name} {os.environ[name]}" for name in _GIVEN)
                raise ValueError(
                    f"kt_ep: true: this process finds no others by {given}, within kt_ep_timeout "
                    f"({config.kt_ep_timeout:g} s): {one_line(error)[:160]}"
                ) from error
        ranks = Ranks(dist.group.WORLD)
        hidden = {name: os.environ.pop(name) for name in _HIDDEN if name in os.environ}
        ends.callback(os.environ.update, hidden)
        if ranks.rank == 0:
            yield ranks
            return
        nowhere = ends.enter_context(open(os.devnull, "w"))
        ends.enter_context(redirect_stdout(nowhere))
        ends.enter_context(redirect_stderr(nowhere))
        try:
            yield ranks
        except (NotFinite, KeyboardInterrupt):
            sys.exit(1)  # rank 0 says why


def _check_keys(config: TrainConfig) -> None:
    """ValueError for keys that do not go together with kt_ep."""
    for key, wrong in (
        ("use_kt: false", not config.use_kt),
        ("kt_num_gpu_experts or kt_gpu_experts_mask", config.kt_num_gpu_experts or config.kt_gpu_experts_mask),
        ("the variable KTVERIFY_CAPTURE", capture.current() is not None),
    ):
        if wrong:
            raise ValueError(f"kt_ep: true and {key} do not work together: leave one of them out")


@contextmanager
def agreed(ranks: Ranks | None) -> Iterator[None]:
    """Let all ranks go on behind the body, or none. An error that rank 0 has as well ends the others without a line;
    RankLost in a rank whose body succeeded while another's did not."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if ranks is None:
            raise
        problem = error
    if ranks is None:
        return
    told = ranks.gather("" if problem is None else one_line(problem))
    if problem is not None:
        if ranks.rank and told[0] == told[ranks.rank]:
            sys.exit(2)
        raise problem
    if any(told):
        other = next(rank for rank, text in enumerate(told) if text)
        raise RankLost(f"rank {ranks.rank} of {ranks.size} stops: rank {other} cannot go on: {told[other]}")


def of_all(config: TrainConfig, ranks: Ranks | None) -> TrainConfig:
    """The configuration of the whole training in one process: each rank has per_device_train_batch_size rows."""
    if ranks is None:
        return config
    return config.model_copy(update={"per_device_train_batch_size": config.per_device_train_batch_size * ranks.size})


@contextmanager
def output_of(config: TrainConfig, ranks: Ranks | None) -> Iterator[str]:
    """The directory that this process writes to: output_dir, but a temporary one for all ranks but the first."""
    if ranks is None or ranks.rank == 0:
        yield config.output_dir
        return
    with tempfile.TemporaryDirectory(prefix="ktverify-rank-") as directory:
        yield directory


def rows_of(inputs: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's rows of a batch, without columns behind its longest row. inputs: input_ids, attention_mask, labels
    [B, L]. A rank without a row gets one that counts for no loss, because all ranks compute equally often."""
    count = len(inputs["labels"])
    first, last = (rank * count // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    rows = slice(first, last) if last > first else slice(0, 1)
    used = int(inputs["attention_mask"][rows].any(0).nonzero().max()) + 1
    found = {name: tensor[rows, :used] for name, tensor in inputs.items()}
    if last == first:
        found["labels"] = torch.full_like(found["labels"], IGNORED)
    return found


class Divided:
    """The parameters of a model whose experts are divided among `ranks`, and their gradients and optimizer's states."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self._adapters = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.share is not None]
        own = {id(p): p for adapter in self._adapters for p in adapter.parameters() if p.requires_grad}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.own, self.dense = list(own.values()), [p for p in trained if id(p) not in own]

    def reduce(self, most: float) -> float:
        """Add the dense gradients over the ranks, clip all gradients to the norm `most` (0 clips nothing), and return
        their norm before. RankLost where another rank ended."""
        for parameter in self.dense:
            if parameter.grad is None:  # unused in this rank's rows
                parameter.grad = torch.zeros_like(parameter)
        gradients = [[p.grad for p in part if p.grad is not None] for part in (self.dense, self.own)]
        norm = self.ranks.reduce(*gradients)
        if most > 0:
            torch.nn.utils.clip_grads_with_norm_([*self.dense, *self.own], most, norm)
        return norm.item()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let state_dict be that of one process, on rank 0, and load_state_dict take one. All ranks call both."""
        optimizer.register_state_dict_post_hook(self._whole)
        optimizer.register_load_state_dict_pre_hook(self._cut)

    def _whole(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": self._states(optimizer, state, whole_state_of)}

    def _cut(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": self._states(optimizer, state, cut_state)}

    def _states(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], change: Any) -> dict[int, Any]:
        """The states by number, those of the experts' LoRA changed pairwise, A and B."""
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        numbers = dict(zip(held, (n for group in state["param_groups"] for n in group["params"]), strict=True))
        found = dict(state["state"])
        for adapter in self._adapters:
            for name in adapter.lora_A:
                a, b = (numbers.get(id(layer[name].weight)) for layer in (adapter.lora_A, adapter.lora_B))
                if a in found and b in found:
                    # of each parameter's shape are the moments, not the number of steps
                    moments = [key for key, value in found[a].items() if isinstance(value, Tensor) and value.dim() == 2]
                    parts = {key: change(adapter, name, found[a][key], found[b][key]) for key in moments}
                    found[a] = {**found[a], **{key: pair[0] for key, pair in parts.items()}}
                    found[b] = {**found[b], **{key: pair[1] for key, pair in parts.items()}}
        return found
