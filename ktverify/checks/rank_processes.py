"""Processes that divide the experts of a layer; the engine's layers of all of them are in the process of the check.

A rank is a forked process of a gloo group. It sends rows to the ranks of their experts, and asks this process to
compute the rows that arrive, by the layer of its experts. So an engine runs where it runs for every other check.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from ktverify.checks.altered_inputs import changed, with_case
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.engines.expert_parallel import Share
from ktverify.engines.run import backward_of, forward
from ktverify.isolation.host import end_with_parent
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import ALL_TENSORS, BASE_NAMES, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, LORA_NAMES, OUTPUT

MOST = 4  # ranks
_TIMEOUT_S = 60.0
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class DividedCall:
    """One forward and backward in which `size` ranks divide the experts. parts: each rank's tokens. steps: of each call
    on the same layers, the LoRA that the experts have then; None for that of the inputs."""

    size: int
    inputs: Inputs
    parts: tuple[slice, ...]
    steps: tuple[Tensors | None, ...] = (None,)


class RankProcesses:
    """`most` forked processes. To be made in a process without threads."""

    def __init__(self, target: Target, most: int = MOST) -> None:
        self._target = target
        # only an engine of this package may have a division of its own: a mutant
        ours = registry.ours(target.engine)
        self._share: type[Share] = getattr(registry.load(target.engine), "share", Share) if ours else Share
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(most)]
        self._connections = [here for here, _ in pipes]
        self._groups = {most}
        given = most, self._share, os.getpid()
        self._processes = [context.Process(target=_be_rank, args=(rank, pipes, *given)) for rank in range(most)]
        for process in self._processes:
            process.start()
        # by it they find each other; its thread begins after the forks
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for here, there in pipes:
            there.close()
            _send(here, self._store.port)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # it keeps nothing
        for process in self._processes:
            process.join()

    def call(self, call: DividedCall) -> list[Tensors]:
        """For each of call.steps ALL_TENSORS of all tokens and experts, in the form of one layer's. Raises what the
        engine raises, and RuntimeError for what a rank raises."""
        served = _Served(self._target, call.inputs)
        found = self.ask(call.size, _compute, [(call, rank) for rank in range(call.size)], served)
        results = []
        for step in range(len(call.steps)):
            tokens = {
                name: torch.cat([each[step][name] for each in found]) for name in (OUTPUT, GRAD_INPUT, GRAD_WEIGHTS)
            }
            tokens |= {name: torch.cat([served.lora[r][step][name] for r in range(call.size)]) for name in GRAD_NAMES}
            results.append({name: tokens[name] for name in ALL_TENSORS})
        return results

    def ask(
        self, size: int, function: Callable[..., Any], given: list[Any], served: _Served | None = None
    ) -> list[Any]:
        """The values of function(rank, one of given) in the first `size` ranks. RuntimeError, with what it says, where
        a rank raises or ends."""
        found: dict[int, Any] = {}
        if size not in self._groups:
            self._groups.add(size)
            for connection in self._connections:
                _send(connection, (None, size, None))
        for rank in range(size):
            _send(self._connections[rank], (function, size, given[rank]))
        while len(found) < size:
            for ready in wait(self._connections[:size]):
                assert isinstance(ready, Connection)
                rank = self._connections.index(ready)
                try:
                    kind, value = pickle.loads(ready.recv_bytes())
                except (EOFError, ConnectionError):
                    raise RuntimeError(f"rank {rank} of {size} ended") from None
                if kind == "found":
                    found[rank] = value
                elif kind == "raised":
                    raise RuntimeError(f"rank {rank} of {size}: {value}")
                else:
                    assert served is not None
                    _send(ready, getattr(served, kind)(rank, *value))
        return [found[rank] for rank in range(size)]


class _Served:
    """The engine's layers, by rank. lora: the LoRA gradients of each of their calls."""

    def __init__(self, target: Target, inputs: Inputs) -> None:
        self._target, self._inputs = target, inputs
        self._layers: dict[int, Any] = {}
        self._waiting: dict[int, Inputs] = {}
        self.lora: dict[int, list[Tensors]] = {}

    def build(self, rank: int, experts: list[int]) -> None:
        """A layer of these experts, for rows of one slot."""
        inputs, case = self._inputs, self._inputs.case
        base = {name: getattr(inputs, name)[experts].contiguous() for name in BASE_NAMES}
        lora = {name: inputs.lora[name][experts].contiguous() for name in LORA_NAMES}
        own = changed(inputs, **base, **lora, physical_map=torch.arange(len(experts)))
        own = with_case(own, num_experts=len(experts), top_k=1)
        rows = max(1, case.qlen * case.top_k)
        self._layers[rank] = self._target.layer(own.case, own, chunked_prefill_size=rows)
        self.lora[rank] = []

    def update(self, rank: int, lora: Tensors) -> None:
        """An optimizer's step."""
        layer = self._layers[rank]
        for name, value in lora.items():
            getattr(layer, name).detach().copy_(value)
        layer.update_lora_weights()

    def forward(self, rank: int, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        called = changed(self._inputs, hidden_states=rows, expert_ids=ids, weights=weights, grad_output=rows)
        self._waiting[rank] = called
        return forward(self._layers[rank], called, save=True)

    def backward(self, rank: int, grad_output: Tensor) -> Tensor:
        found = backward_of(self._layers[rank], replace(self._waiting[rank], grad_output=grad_output))
        self.lora[rank].append({name: found[name].clone() for name in GRAD_NAMES})
        return found[GRAD_INPUT]


def _send(connection: Connection, value: object) -> None:
    connection.send_bytes(pickle.dumps(value))  # by value: a tensor of torch's own way would be a shared file


# ---- a rank


@dataclass
class Rank:
    """This process. share: makes its Share of so many experts in the group of the present call."""

    connection: Connection
    share: Callable[[int], Share]

    def served(self, method: str, *given: Any) -> Any:
        """The value of a method of _Served."""
        _send(self.connection, (method, given))
        return pickle.loads(self.connection.recv_bytes())


def _be_rank(rank: int, pipes: list[tuple[Connection, Connection]], most: int, kind: type[Share], parent: int) -> None:
    end_with_parent(parent=parent)
    connection = pipes[rank][1]
    # a copy of its end here would hide that another rank has ended
    for end in {end for pipe in pipes for end in pipe} - {connection}:
        end.close()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    store = TCPStore("127.0.0.1", pickle.loads(connection.recv_bytes()), is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=most, timeout=timeout)
    groups = {most: dist.group.WORLD}
    while True:
        try:
            function, size, given = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if function is None:  # all ranks make a group together, also those that are not in it
                groups[size] = dist.new_group(list(range(size)), timeout=timeout)
                continue
            here = Rank(connection, lambda total, group=groups[size]: kind(group, total))  # type: ignore[misc]
            reply = ("found", function(here, given))
        except Exception as error:
            traceback.print_exc()
            reply = ("raised", f"{type(error).__name__}: {error}")
        _send(connection, reply)


class _Remote(torch.autograd.Function):
    """rows [R, H], ids [R, 1], weights [R, 1] -> [R, H], by the layer of this rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, weights: Tensor, rank: Rank) -> Tensor:
        ctx.rank = rank
        output: Tensor = rank.served("forward", rows, ids, weights)
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.rank.served("backward", grad[0].contiguous()), None, None, None


def _compute(rank: Rank, given: tuple[DividedCall, int]) -> list[Tensors]:
    """This rank's results of its tokens, for each of the call's steps."""
    call, number = given
    inputs, tokens = call.inputs, call.parts[number]
    share = rank.share(inputs.case.num_experts)
    experts = list(share.experts)
    rank.served("build", experts)
    apply: Any = _Remote.apply
    results = []
    for lora in call.steps:
        if lora is not None:
            rank.served("update", {name: value[experts] for name, value in lora.items()})
        x, w = (tensor[tokens].clone().requires_grad_() for tensor in (inputs.hidden_states, inputs.weights))
        output = share.forward(lambda *rows: apply(*rows, rank), x, inputs.expert_ids[tokens], w)
        # the same gradient of the output; to give it to backward imports sympy, in every rank
        torch.autograd.backward((output.float() * inputs.grad_output[tokens].float()).sum())
        assert x.grad is not None
        assert w.grad is not None
        results.append({OUTPUT: output.detach(), GRAD_INPUT: x.grad, GRAD_WEIGHTS: w.grad})
    return results
