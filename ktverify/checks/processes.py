"""How a layer behaves as a part of a process: threads, forks, the interpreter's lock, memory, instruction sets.

A check that depends on what happened in its process before is marked `fresh_process`.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.checks.check import Function, Where, check
from ktverify.checks.target import MIDDLE, SMALL, WIDE, Target, bits, expect, same_bits
from ktverify.engines.run import backward_of, forward, run_layer
from ktverify.isolation import hosted
from ktverify.isolation.process import processes_of
from ktverify.judge import gates
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS, LORA_NAMES, OUTPUT

# sentences of docs/contract.md
FORKED = "A process forked before the first use, or in the middle of another thread's call, has a layer that works."
PYTHON_THREADS = (
    "Several Python threads may share a layer or have layers of their own, and other Python code runs while a call "
    "computes."
)
NO_MEMORY = "Memory that ends while experts are packed: MemoryError, and the same call works once there is enough."


def _process(
    contract: str, *, gates: tuple[str, ...] = (), native: bool = True, **more: Any
) -> Callable[[Function], Function]:
    """Enter a check of this module: on the best instruction set, because all of them share what it looks at."""
    return check("processes", contract, gates=gates, where=Where.BEST_ISA, native=native, **more)


def digest(found: dict[str, Tensor]) -> str:
    """Hash of all tensors' bytes."""
    total = hashlib.sha256()
    for name in ALL_TENSORS:
        total.update(bits(found[name]).numpy().tobytes())
    return total.hexdigest()


def peak_memory() -> int:
    """The most resident memory that the engine's process ever had, in bytes."""
    peaks = [re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in hosted.processes()]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * max((int(peak.group(1)) for peak in peaks if peak is not None), default=own)


def fork_and_run(target: Target, case: Case, layer: object | None = None, inputs: Inputs | None = None) -> str:
    """The digest that a forked child computes, on `layer` or on one of its own. AssertionError if it dies or hangs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            inputs = make_inputs(case) if inputs is None else inputs
            found = target.run(case, inputs) if layer is None else run_layer(layer, inputs)
            os.write(write, digest(found).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise AssertionError("a forked process hangs")
        time.sleep(0.01)
    with os.fdopen(read, "rb") as stream:
        text = stream.read().decode()
    expect(status == 0, f"a forked process ended with status {status}")
    return text


@_process(FORKED, internal=True, fresh_process=True)
def check_fork_before_use(target: Target) -> None:
    """Forked after the import, and after a layer was built and loaded, parent and child compute the same bits."""
    torch.set_num_threads(1)
    _ = target.factory
    forked = [fork_and_run(target, MIDDLE)]
    layer = target.layer(MIDDLE, make_inputs(MIDDLE))
    forked.append(fork_and_run(target, MIDDLE, layer))
    own = digest(run_layer(layer, make_inputs(MIDDLE)))
    expect(forked == [own, own], "a forked process computes other bits than its parent")


@_process(PYTHON_THREADS, cause=Cause.THREADS)
def check_threads_with_layers_of_their_own(target: Target) -> None:
    """Python threads that each have a layer get the bits that one thread gets."""
    torch.set_num_threads(1)
    cases = [MIDDLE, WIDE, SMALL, MIDDLE.with_seed(3)]
    expected = [digest(target.run(case)) for case in cases]
    failed: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(5):
                if digest(target.run(cases[index])) != expected[index]:
                    failed.append(f"thread {index} got other bits")
        except Exception as error:
            failed.append(f"thread {index}: {type(error).__name__}: {error}")

    _in_threads(work, len(cases))
    expect(not failed, "; ".join(failed[:4]))


@_process(PYTHON_THREADS, cause=Cause.THREADS)
def check_threads_that_share_a_layer(target: Target) -> None:
    """Python threads that call one layer's forward at once each get their own batch's bits."""
    torch.set_num_threads(1)
    batches = [make_inputs(MIDDLE.with_seed(seed)) for seed in range(4)]
    weights = batches[0]
    layer = target.layer(MIDDLE, weights)

    expected = [forward(layer, batch, save=False) for batch in batches]
    failed: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                if not same_bits(forward(layer, batches[index], save=False), expected[index]):
                    failed.append(f"thread {index} got other bits")
        except Exception as error:
            failed.append(f"thread {index}: {type(error).__name__}: {error}")

    _in_threads(work, 4)
    expect(not failed, "; ".join(failed[:4]))


def _in_threads(work: object, count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        expect(not thread.is_alive(), "a thread hangs")


@_process(PYTHON_THREADS, internal=True)
def check_interpreter_runs_on(target: Target) -> None:
    """While one thread is inside forward and backward, another Python thread makes progress."""
    case = Case.parse("E=4,k=2,H=512,I=512,T=256,r=8,alpha=16")
    inputs = make_inputs(case)
    layer = target.layer(case, inputs, threads=1)
    run_layer(layer, inputs)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    windows: list[tuple[float, float]] = []
    try:
        # a loaded machine may not give the other thread a turn in any single call
        for _ in range(200):
            begin = time.perf_counter()
            forward(layer, inputs, save=True)
            between = time.perf_counter()
            layer.backward(inputs.grad_output)
            windows += [(begin, between), (between, time.perf_counter())]
            # only the middle of a call counts: at its edges the interpreter itself changes threads
            found = [_inside(ticks, windows[part::2]) for part in (0, 1)]
            if min(found) >= 3:
                return
    finally:
        stop.set()
        ticker.join()
    raise AssertionError(f"another Python thread ran {found[0]} times inside forward, {found[1]} inside backward")


def _inside(ticks: list[float], windows: list[tuple[float, float]]) -> int:
    middles = [(begin + 0.3 * (end - begin), begin + 0.7 * (end - begin)) for begin, end in windows]
    return sum(any(begin < tick < end for begin, end in middles) for tick in list(ticks))


def _workers() -> int:
    """Threads beyond the first of this process, of the engine's, and of each that they started."""
    found = {process.pid: process for pid in (os.getpid(), *hosted.processes()) for process in processes_of(pid)}
    return sum(process.num_threads() - 1 for process in found.values())


@_process(
    "cpuinfer_threads is a ceiling, and so is the number of processors that the process may run on.",
    gates=("resources",),
    cause=Cause.THREADS,
    fresh_process=True,
    native=False,
)
def check_threads_have_a_ceiling(target: Target) -> None:
    """cpuinfer_threads = 64 makes no more workers than this process may run on, counted after its affinity was cut;
    cpuinfer_threads = 1 makes one at most."""
    torch.set_num_threads(1)
    inputs = make_inputs(MIDDLE)
    allowed = sorted(os.sched_getaffinity(0))
    for processors, threads in ((1, 64), (len(allowed), 64), (len(allowed), 1)):
        os.sched_setaffinity(0, allowed[:processors])
        before = _workers()
        layer = target.layer(MIDDLE, inputs, threads=threads)
        run_layer(layer, inputs)
        more = _workers() - before
        text = f"{more} threads were started on {processors} processors with cpuinfer_threads {threads}"
        target.expect(more <= min(processors, threads), text, "resources")
        del layer


@_process(
    "An expert that no token has reached costs no memory for its weights.",
    gates=("resources",),
    fresh_process=True,
    native=False,
)
def check_idle_experts_take_no_memory(target: Target) -> None:
    """A layer of 128 experts, of which one token reaches two, takes the memory of a few experts."""
    case = Case.parse("E=128,k=2,H=1024,I=1024,T=1,r=1,alpha=2")
    inputs = make_inputs(case)
    one = 3 * 2 * case.hidden * case.intermediate
    lora = sum(tensor.numel() * tensor.element_size() for tensor in inputs.lora.values())
    target.run(SMALL)
    before = hosted.resident()
    layer = target.layer(case, inputs)
    run_layer(layer, inputs)
    grown = hosted.resident() - before
    numbers = gates.tolerances()["memory"]
    budget = numbers["idle_experts"] * one + numbers["idle_lora"] * lora
    target.expect(
        grown < budget, f"{grown / 1e6:.0f} MB for two of 128 experts of {one / 1e6:.0f} MB each", "resources"
    )
    del layer


@_process("a waiting backward keeps those of its forward", gates=("bits",), cause=Cause.STALE_LORA, native=False)
def check_update_while_forward_waits(target: Target) -> None:
    """The backward of a forward that was saved before update_lora_weights belongs to the values of its forward."""
    inputs = make_inputs(MIDDLE)
    expected = target.run(MIDDLE, inputs)
    layer = target.layer(MIDDLE, inputs)
    output = forward(layer, inputs, save=True)
    with torch.no_grad():
        for name in LORA_NAMES:
            getattr(layer, name).mul_(-1.5)
    layer.update_lora_weights()
    found = {OUTPUT: output, **backward_of(layer, inputs)}
    target.expect_same_bits("update_lora_weights between forward and backward", expected, found)
    changed = replace(inputs, lora={name: getattr(layer, name).detach().clone() for name in LORA_NAMES})
    target.expect_same_bits("the forward after the update", target.run(MIDDLE, changed), run_layer(layer, inputs))


@_process(FORKED, internal=True, fresh_process=True)
def check_fork_during_a_call(target: Target) -> None:
    """A process forked while another thread computes has a layer that works."""
    inputs = make_inputs(MIDDLE)
    layer = target.layer(MIDDLE, inputs)
    expected = run_layer(layer, inputs)
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            forward(layer, inputs, save=False)

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        for _ in range(4):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                try:
                    target.expect_same_bits("in a forked child", expected, run_layer(layer, inputs))
                except BaseException:
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            expect(status == 0, f"a child forked during a call ended with status {status} (14: it hung)")
    finally:
        stop.set()
        busy.join()


@_process("New base weights are refused while a forward waits (RuntimeError).", internal=True, fresh_process=True)
def check_reload_refused_while_forward_waits(target: Target) -> None:
    """New base weights are refused while a saved forward waits for its backward, which then works."""
    inputs = make_inputs(SMALL)
    expected = target.run(SMALL, inputs)
    layer = target.layer(SMALL, inputs)
    forward(layer, inputs, save=True)
    bases = (inputs.slotted("gate_proj"), inputs.slotted("up_proj"), inputs.slotted("down_proj"))
    try:
        layer.load_weights_from_tensors(*bases, inputs.physical_map)
    except RuntimeError as error:
        expect("backward" in str(error), f"the error must say to call backward first, it says {error}")
    else:
        raise AssertionError("base weights were exchanged under a saved forward")
    grad_input, _ = layer.backward(inputs.grad_output)
    expect(torch.equal(grad_input, expected["grad_input"]), "the backward after the refusal gives other bits")


@_process(NO_MEMORY, internal=True, fresh_process=True)
def check_no_memory_half_way(target: Target) -> None:
    """Memory that ends while experts are packed: MemoryError, and the same call is right once there is enough."""
    case = Case.parse("E=16,k=8,H=1024,I=1024,T=16,r=4,alpha=8")
    inputs = make_inputs(case)
    expected = target.run(case, inputs)[OUTPUT]
    refused = 0
    for extra in (16 << 20, 40 << 20, 70 << 20, 100 << 20, 115 << 20):
        layer = target.layer(case, inputs)
        layer.clear_sft_buffer_cache()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + extra, hard))
        try:
            forward(layer, inputs, save=False)
        except MemoryError:
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        found = forward(layer, inputs, save=False)
        expect(torch.equal(found, expected), f"other bits after {extra >> 20} MiB were all there was")
    expect(refused > 0, "no limit was low enough: nothing was tried")


@_process(NO_MEMORY, gates=("bits",), internal=True, fresh_process=True)
def check_no_memory_for_another_dtype(target: Target) -> None:
    """Memory that ends while LoRA of another dtype is taken over: MemoryError, and the layer is what it was."""
    inputs = make_inputs(SMALL)
    layer = target.layer(SMALL, inputs)
    without_memory = mock.Mock(wraps=layer._native, **{"update_lora.side_effect": MemoryError("for LoRA")})
    try:
        with mock.patch.object(layer, "_native", without_memory):
            layer.init_lora_weights(*(inputs.lora[name].float() for name in LORA_NAMES))
    except MemoryError:
        target.expect_same_bits("after MemoryError", target.run(SMALL, inputs), run_layer(layer, inputs))
        return
    raise AssertionError("the engine was not asked to take LoRA over")
