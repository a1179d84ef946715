"""Routed experts that are divided among the ranks of a torch.distributed group. Every rank has its own tokens.

For each slot, the token's row goes to the rank that holds the expert, and the expert's output comes back: bf16, by
all_to_all_single, 4 T k H 2 bytes a layer for forward and backward. Routing weights do not travel. The gradients of an
expert's LoRA are complete on its rank, because all tokens of the expert are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ktverify.errors import RankLost, one_line

# rows [R, H] bf16, ids [R, 1] int64 counted from the share's first expert, weights [R, 1] of 1.0 -> [R, H] bf16
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ranks:
    """The processes of `group`, a group of torch.distributed.

    ValueError in a process that is not of the group."""

    group: Any

    def __post_init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("expert_parallel needs processes that know each other: call init_process_group first")
        if self.rank < 0:
            raise ValueError("expert_parallel is a group that this process does not belong to")

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def device(self) -> torch.device:
        """Where tensors must be to travel: nccl takes those of the rank's GPU alone."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Give rank i the next sent[i] of `rows`, and return received[i] rows of each rank i, in the order of ranks.

        RankLost where another rank ended, or did not come to this call within the group's timeout."""
        found = rows.new_empty((sum(received), *rows.shape[1:]))
        with self._others():
            dist.all_to_all_single(found, rows.contiguous(), received, sent, group=self.group)
        return found

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives here, by rank. RankLost as for `exchange`."""
        found: list[Any] = [None] * self.size
        with self._others():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def to_first(self, value: Any) -> list[Any]:
        """On rank 0 what every rank gives here, by rank; [] on the others. RankLost as for `exchange`."""
        found: list[Any] = [None] * self.size if self.rank == 0 else []
        with self._others():
            dist.gather_object(value, found or None, dist.get_global_rank(self.group, 0), group=self.group)
        return found

    def add(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor of this shape, on all ranks with the same bits, in value's device. RankLost as
        for `exchange`."""
        total = value.detach().to(self.device, copy=True)
        with self._others():
            dist.all_reduce(total, group=self.group)
        return total.to(value.device)

    def reduce(self, dense: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add the gradients `dense`, of parameters that every rank has, over the ranks, in place and in fp32; return
        the norm of all gradients, fp32 []: those once, and `own`, of the LoRA of each rank's experts, of all ranks.

        They are gradients of the sum of all ranks' losses then, as `own` are without a sum. RankLost as for
        `exchange`."""
        squares = _squares(own)
        if dense:
            parts = torch.split(self.add(torch.cat([t.float().flatten() for t in dense])), [t.numel() for t in dense])
            for gradient, part in zip(dense, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))
        return (self.add(squares) + _squares(dense)).sqrt().float()

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} stops: another rank ended or gave no answer in time "
                f"({one_line(error)[:160]}); its own error says why"
            ) from error

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group of processes has no copy

    def __reduce__(self) -> NoReturn:
        raise TypeError("experts that are divided among processes cannot be pickled: save the adapter")


def _squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp64 []: the sum of all squares."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64).cpu() for gradient in gradients]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def bounds_of(total: int, size: int) -> list[int]:
    """The first of `total` experts that each of `size` ranks holds, and `total`."""
    return [rank * total // size for rank in range(size + 1)]


@dataclass(frozen=True)
class Share(Ranks):
    """What a rank of `group` has of `total` experts: rank i of n those from ⌊i E / n⌋ up to ⌊(i + 1) E / n⌋ − 1, so
    that two ranks differ by at most one expert. The methods after `forward` are its steps.

    ValueError where there are more ranks than experts, and in a process that is not of the group."""

    total: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size > self.total:
            raise ValueError(f"expert_parallel has {self.size} ranks for {self.total} experts: a rank needs one")

    @property
    def bounds(self) -> list[int]:
        """The first expert of every rank, and `total`."""
        return bounds_of(self.total, self.size)

    @property
    def experts(self) -> range:
        """The experts of this rank."""
        return range(*self.bounds[self.rank : self.rank + 2])

    @property
    def widths(self) -> list[int]:
        """The number of experts of every rank."""
        return [last - first for first, last in itertools.pairwise(self.bounds)]

    def whole(self, own: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """On rank 0 the tensor of all experts, which are its dimension `dim`, of every rank's `own`; on other ranks
        `own`. RankLost as for `exchange`."""
        parts = self.to_first(own.detach().cpu())
        return torch.cat(parts, dim) if parts else own

    def forward(
        self, compute: Compute, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], expert_ids [T, k] of all `total` experts or −1, weights [T, k] -> output [T, H], in the
        device and dtype of hidden_states. T may differ between ranks, and be 0.

        compute: the experts of this rank; each row is one slot, with the weight 1. Weights are multiplied in here, in
        fp32; a token's slots are added in fp32 in their order and rounded once. So the same call has the same bits.
        All ranks must call forward, and backward where one does, equally often and in the same order.
        ValueError for an id of no expert; RankLost where another rank ended.
        """
        device = self.device
        x = hidden_states.to(device, torch.bfloat16)
        ids = expert_ids.detach().to(device, torch.int64)
        slot_weights = weights.to(device, torch.float32).where(ids >= 0, 0.0)  # a weight beside -1 may be NaN
        route, own_ids = _route(self, ids)
        ones = torch.ones(own_ids.shape, dtype=torch.float32, device=device)
        send: Any = _Send.apply
        give_back: Any = _Return.apply
        output: torch.Tensor = give_back(compute(send(x, route), own_ids, ones), slot_weights, route)
        return output.to(hidden_states.device, hidden_states.dtype)

    def go(self, route: Route, rows: torch.Tensor) -> torch.Tensor:
        """From one row for each of route.slots to one for each slot that this rank computes."""
        return self.exchange(rows, route.sent, route.received)

    def back(self, route: Route, rows: torch.Tensor) -> torch.Tensor:
        """The way back: [T, k, H] with zeros for slots that do not travel."""
        found = rows.new_zeros((route.tokens * route.top_k, rows.shape[1]))
        found[route.slots] = self.exchange(rows, route.received, route.sent)
        return found.view(route.tokens, route.top_k, rows.shape[1])

    def weighted(self, route: Route, upstream: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The gradients of the experts' outputs: upstream [T, H] fp32, weights [T, k] -> a bf16 row for each slot."""
        rows = upstream[route.slots // route.top_k] * weights.reshape(-1, 1)[route.slots]
        return rows.to(torch.bfloat16)

    def weight_gradient(self, of_slots: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        """The gradient of the routing weights, fp32 [T, k]: of_slots [T, k, H] bf16, upstream [T, H] fp32."""
        return torch.stack([(upstream * y.float()).sum(1) for y in of_slots.unbind(1)], 1)

    def added(self, of_slots: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over slots, [T, k, H] bf16 -> [T, H] bf16: in fp32, in their order, rounded once."""
        total = torch.zeros_like(of_slots[:, 0], dtype=torch.float32)
        for slot, rows in enumerate(of_slots.unbind(1)):
            value = rows.float()
            # multiplied before it is added: addcmul may round once in vectors and twice behind the last one
            total += value if weights is None else value * weights[:, slot : slot + 1]
        return total.to(torch.bfloat16)


@dataclass(frozen=True)
class Route:
    """Where the rows of one call go. slots: the slots that travel, as indices of [T k], by expert and then by token;
    sent, received: rows for and from each rank."""

    share: Share
    tokens: int
    top_k: int
    slots: torch.Tensor
    sent: list[int]
    received: list[int]


def _route(share: Share, ids: torch.Tensor) -> tuple[Route, torch.Tensor]:
    """The route of a call, and the ids [R, 1] of the rows that arrive, counted from this rank's first expert."""
    tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    wrong = ((flat < -1) | (flat >= share.total)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"expert_ids[{at // top_k}, {at % top_k}] is {int(flat[at])}; it takes 0 to {share.total - 1}, or -1"
        )
    order = torch.argsort(flat, stable=True)
    slots = order[int((flat < 0).sum()) :]
    counts = torch.bincount(flat[slots], minlength=share.total)
    widths, own = share.widths, len(share.experts)
    # a rank gets the counts of its own experts from every rank. Rows come sorted by expert, so that these are the ids
    arriving = share.exchange(counts, widths, [own] * share.size).view(share.size, own)
    own_ids = torch.arange(own, device=ids.device).repeat(share.size).repeat_interleave(arriving.reshape(-1))
    sent = [int(part.sum()) for part in torch.split(counts, widths)]
    route = Route(share, tokens, top_k, slots, sent, arriving.sum(1).tolist())
    return route, own_ids.unsqueeze(1)


class _Send(torch.autograd.Function):
    """x [T, H] bf16 -> the rows [R, H] that this rank's experts get. Backward: the sum of a token's slots."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return route.share.go(route, x[route.slots // route.top_k])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        share: Share = ctx.route.share
        return share.added(share.back(ctx.route, grad.to(torch.bfloat16))), None


class _Return(torch.autograd.Function):
    """y [R, H] bf16 of this rank's experts, weights [T, k] fp32 -> output [T, H] bf16 of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weights: torch.Tensor, route: Route) -> torch.Tensor:
        of_slots = route.share.back(route, y)
        ctx.route = route
        ctx.save_for_backward(of_slots, weights)
        return route.share.added(of_slots, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        of_slots, weights = ctx.saved_tensors
        route: Route = ctx.route
        upstream, share = grad.float(), route.share
        rows = share.go(route, share.weighted(route, upstream, weights))
        return rows, share.weight_gradient(of_slots, upstream), None
