"""Processes that form a gloo group of torch.distributed, and what they compute in the tests of expert parallel."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ktverify.engines.expert_parallel import Share
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.errors import RankLost
from ktverify.isolation.child import Child
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES
from ktverify.training.layer import Call, MOEAMXFunction

CASE = Case("ranks", "experts divided among processes", 7, 3, 40, 24, 23, 4, 8.0)


def on_ranks(
    size: int,
    directory: Path,
    function: Callable[..., Any],
    *given: Any,
    timeout_s: float = 120.0,
    preload: tuple[str, ...] = (),
) -> list[Any]:
    """The values of function(*given) in `size` processes that are a gloo group, by rank; None of one that ended.

    directory: one in which they find each other. They are forked by a process that has torch, the modules `preload`
    and no threads."""
    with Child(preload=preload) as parent:
        found: list[Any] = parent.call(_fork, size, str(directory / f"group{size}"), timeout_s, function, given)
    return found


def _fork(size: int, file: str, timeout_s: float, function: Callable[..., Any], given: tuple[Any, ...]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_be_rank, args=(rank, size, file, timeout_s, pipes[rank][1], function, given))
        for rank in range(size)
    ]
    for process, (_, there) in zip(processes, pipes, strict=True):
        process.start()
        there.close()
    found = []
    for here, _ in pipes:
        try:
            found.append(pickle.loads(here.recv_bytes()))
        except EOFError:
            found.append(None)
    for process in processes:
        process.join()
    return found


def _be_rank(
    rank: int, size: int, file: str, timeout_s: float, to: Any, function: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timeout)
    to.send_bytes(pickle.dumps(function(*given)))  # by value: this process ends before the other reads


# ---- one layer


def routings() -> dict[str, tuple[list[int], np.ndarray[Any, Any]]]:
    """Name -> (share of the tokens of up to four ranks, expert ids [T, k])."""
    draw = np.random.default_rng(11)
    shape = (CASE.qlen, CASE.top_k)
    spread = np.stack([draw.permutation(CASE.num_experts)[: CASE.top_k] for _ in range(CASE.qlen)])
    some = np.where(draw.random(shape) < 0.4, -1, spread)
    some[:2] = -1
    return {
        "spread": ([1, 1, 1, 1], spread),
        "uneven tokens": ([1, 5, 2, 0], spread),
        "no token on the first rank": ([0, 2, 1, 1], spread),
        "all tokens to the first rank": ([1, 1, 1, 1], np.zeros(shape, np.int64)),
        "all tokens to the last expert": ([1, 2, 1, 1], np.full(shape, CASE.num_experts - 1)),
        "duplicates": ([1, 1, 2, 1], draw.integers(0, 2, shape) * 3),
        "slots of other layers": ([2, 1, 1, 1], some),
        "no slot at all": ([1, 1, 1, 1], np.full(shape, -1)),
    }


def inputs_of(ids: np.ndarray[Any, Any]) -> Inputs:
    found = make_inputs(CASE, expert_ids=ids.astype(np.int64))
    found.weights[found.expert_ids < 0] = torch.nan
    return found


def tokens_of(parts: list[int], rank: int, size: int) -> slice:
    """The tokens of a rank; of one rank, all."""
    if size == 1:
        return slice(0, CASE.qlen)
    edges = np.cumsum([0, *parts[:size]]) * CASE.qlen // sum(parts[:size])
    return slice(int(edges[rank]), int(edges[rank + 1]))


def layer_results(repeats: int) -> dict[str, list[dict[str, Tensor]]]:
    """By routing, for each repeat: all tensors of this rank's tokens, and the LoRA gradients of its experts."""
    share = Share(dist.group.WORLD, CASE.num_experts)
    return {
        name: [_one_call(share, inputs_of(ids), tokens_of(parts, share.rank, share.size)) for _ in range(repeats)]
        for name, (parts, ids) in routings().items()
    }


def engine_of(inputs: Inputs, experts: range) -> KTMoEWrapper:
    """The native engine with these experts alone, for rows of one slot."""
    own = slice(experts.start, experts.stop)
    case = inputs.case
    engine = KTMoEWrapper(
        layer_idx=0,
        num_experts=len(experts),
        num_experts_per_tok=1,
        hidden_size=case.hidden,
        moe_intermediate_size=case.intermediate,
        cpuinfer_threads=1,
        lora_rank=case.rank,
        lora_alpha=case.alpha,
        max_cache_depth=2,
    )
    gate, up, down = (getattr(inputs, name)[own] for name in BASE_NAMES)
    engine.load_weights_from_tensors(gate, up, down, torch.arange(len(experts)))
    engine.init_lora_weights(*(inputs.lora[name][own].contiguous() for name in LORA_NAMES))
    return engine


def _one_call(share: Share, inputs: Inputs, tokens: slice) -> dict[str, Tensor]:
    engine = engine_of(inputs, share.experts)
    lora = {name: getattr(engine, name).clone().requires_grad_() for name in LORA_NAMES}
    x, w = (tensor[tokens].clone().requires_grad_() for tensor in (inputs.hidden_states, inputs.weights))
    call = Call(engine, 0, lambda: 0, True, 2)

    def compute(rows: Tensor, ids: Tensor, ones: Tensor) -> Tensor:
        apply: Any = MOEAMXFunction.apply
        output: Tensor = apply(rows, ids, ones, call, *lora.values())
        return output

    output = share.forward(compute, x, inputs.expert_ids[tokens], w)
    torch.autograd.backward(output, inputs.grad_output[tokens])
    gradients = {"grad_input": x.grad, "grad_weights": w.grad, **{f"grad_{n}": t.grad for n, t in lora.items()}}
    return {"output": output.detach(), **{name: tensor for name, tensor in gradients.items() if tensor is not None}}


# ---- a training


def train(keys: dict[str, Any]) -> bool:
    """Whether this rank is the one that writes and prints, after the training that `keys` describe."""
    from ktverify.training.config import TrainConfig
    from ktverify.training.pretrained import quiet
    from ktverify.training.run import run

    quiet("a test")
    return run(TrainConfig.model_validate(keys), Path()).first


# where a rank is: what stands before its command, and variables of its own
HERE: tuple[Sequence[str], Mapping[str, str]] = ((), {})


@contextmanager
def two_commands(
    config: Path, port: int, address: str = "127.0.0.1", places: Sequence[tuple[Sequence[str], Mapping[str, str]]] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """`train` of a configuration by two ranks, as torchrun starts them. What still runs behind the body is killed."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank, (before, more) in enumerate(places or (HERE, HERE)):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": port}
            variables = {**os.environ, **{name: str(value) for name, value in given.items()}, **more}
            command = [*before, sys.executable, "-m", "ktverify", "train", str(config)]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for_a_step(output: Path, seconds: float = 240.0) -> None:
    """Return when a training has logged a step. AssertionError where it has not in time."""
    log, give_up = output / "loss.jsonl", time.monotonic() + seconds
    while not (log.is_file() and log.stat().st_size):
        assert time.monotonic() < give_up, f"{log} has no line after {seconds:g} s"
        time.sleep(0.1)


# ---- ranks that end


def lost(way: str) -> str:
    """What rank 0 says of rank 1, which ends ("ended") or never comes to the call ("silent")."""
    share = Share(dist.group.WORLD, CASE.num_experts)
    # a rank that ends before the other has formed the group is an error of torch
    store: Any = dist.distributed_c10d._get_default_store()
    if share.rank == 0:
        store.set("formed", "yes")
    else:
        store.wait(["formed"])
        if way == "ended":
            os._exit(3)
        return ""
    try:
        layer_results(1)
    except RankLost as error:
        return str(error)
    return "nothing was raised"


# ---- a model


def experts_in_files(small: str, large: str, backend: str) -> tuple[list[dict[str, Tensor]], list[int], int]:
    """The base weights of this rank's experts in each layer of the model `small`; of `large`, after a call that reaches
    all experts, how many each layer has packed, and by how many bytes the peak of memory grew."""
    from ktverify.training import init_cpu_infer, load_model, wrap_moe_layers
    from tests.support import models

    def run_model(path: str) -> Any:
        infer = init_cpu_infer(1, backend=backend)
        loaded = load_model(path, "bfloat16", infer=infer, in_files=True)
        model = wrap_moe_layers(loaded, infer, expert_parallel=dist.group.WORLD)
        with torch.no_grad():
            model(input_ids=models.token_ids(4, 40, seed=dist.get_rank()))
        return model

    weights = [wrapper.engine.base_weights() for wrapper in run_model(small)._kt_wrappers]
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = run_model(large)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return weights, [wrapper.engine.packed_experts for wrapper in model._kt_wrappers], peak - before


def model_results(adapter: str, out: str) -> tuple[float, dict[str, Tensor], dict[str, int]]:
    """The loss of this rank's rows, all gradients, and the bytes of base weights of its experts by layer.

    adapter: a directory to load from; out: one to save to, together with the other ranks."""
    from ktverify.training import init_cpu_infer, load_adapter, wrap_moe_layers
    from ktverify.training.tiny import build_model
    from tests.support import models

    rank, size = dist.get_rank(), dist.get_world_size()
    stock = build_model("deepseek_v3").float()
    model: Any = wrap_moe_layers(stock, init_cpu_infer(1), expert_parallel=dist.group.WORLD)
    held = {str(at): sum(t.nbytes for t in wrapper._sources) for at, wrapper in enumerate(model._kt_wrappers)}
    adapted = load_adapter(model, adapter, trainable=True)
    rows = models.token_ids(12)[rank * 12 // size : (rank + 1) * 12 // size]
    loss = adapted(input_ids=rows, labels=rows).loss / size
    torch.autograd.backward(loss)
    adapted.save_pretrained(out)
    return loss.item(), models.gradients(adapted), held
