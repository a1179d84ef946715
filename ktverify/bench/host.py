"""One engine of the bench in a process of its own, which computes on request; in between it blocks on a pipe.

isolation/host.py serves `PeerHost`, under any Python from 3.10 on that has torch and the engine: this module imports
nothing of ktverify. A request is {"do": "load" | "forward" | "backward" | "stages" | "write" | "call", ...}. Times are
nanoseconds of this process's monotonic clock around the call alone. Before each call the tokens are brought into
another order.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

BASE_NAMES = ("gate_proj", "up_proj", "down_proj")
# with a row for each token
TOKENS = ("hidden_states", "expert_ids", "weights", "grad_output")
TOKEN_RESULTS = ("output", "grad_input", "grad_weights")


class BenchInputs:
    """The input of a peer's `load`: arguments and tensors of one case.

    arguments: the keyword arguments of KTMoEWrapper. threads: int; isa: str, "" for the best; options: those of this
    peer alone. load_module: returns the module of a file. about: entries that a peer adds to its record.
    tensors: hidden_states, grad_output [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32, gate_proj, up_proj
    [E, I, H], down_proj [E, H, I] bf16, and the six LoRA tensors in bf16. The base weights are a mapped file and go
    away after `load`: a peer copies what it keeps. step: of the grid that they lie on (coded.on_grid), 0 for none.
    """

    base_names = BASE_NAMES

    def __init__(
        self,
        directory: Path,
        threads: int,
        isa: str,
        options: dict[str, str],
        load_module: Callable[[Path], ModuleType],
    ) -> None:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        self.arguments: dict[str, Any] = {**manifest["arguments"], "cpuinfer_threads": threads}
        self.threads = threads
        self.isa = isa
        self.options = options
        self.load_module = load_module
        self.about: dict[str, str] = {}
        self.step: float = manifest["step"]
        self.lora_names: tuple[str, ...] = tuple(manifest["lora_names"])
        self.tensors: dict[str, Any] = {}
        for name, entry in manifest["tensors"].items():
            mapped = map_tensor(directory / "inputs" / name, entry["dtype"], entry["shape"])
            self.tensors[name] = mapped if name in BASE_NAMES else mapped.clone()

    def layer(self, factory: Callable[..., Any], *, copied: Sequence[str] = (), **more: Any) -> Any:
        """A layer of `factory`, loaded. copied: the base weights that the layer keeps as they are given."""
        import torch

        layer = factory(**{**self.arguments, **more})
        base = [self.base(name) if name in copied else self.tensors[name] for name in BASE_NAMES]
        layer.load_weights_from_tensors(*base, torch.arange(len(base[0]), dtype=torch.int64))
        layer.init_lora_weights(*(self.tensors[name] for name in self.lora_names))
        return layer

    def base(self, name: str) -> Any:
        """A copy of a base weight in memory of this process."""
        return self.tensors[name].clone()


class ContractPeer:
    """A layer with the calls of docs/contract.md, as the bench calls it. Nothing but the call lies within a time."""

    def __init__(self, layer: Any, inputs: BenchInputs) -> None:
        import torch

        t = inputs.tensors
        self.layer = layer
        self.inputs = (t["hidden_states"], t["expert_ids"], t["weights"])
        self.grad_output = t["grad_output"]
        self.made: dict[str, Any] = {}
        self.about = {"isa": layer.isa, "threads": str(getattr(layer, "threads", torch.get_num_threads()))}

    def forward(self) -> None:
        self.made["output"] = self.layer.forward_sft(*self.inputs, save_for_backward=False)

    def forward_saving(self) -> None:
        self.made["output"] = self.layer.forward_sft(*self.inputs, save_for_backward=True)

    def backward(self) -> None:
        self.made["grad_input"], grads = self.layer.backward(self.grad_output)
        self.made.update(grads)

    def results(self) -> dict[str, Any]:
        grad_weights = self.layer.grad_weights
        return {**self.made, **({} if grad_weights is None else {"grad_weights": grad_weights})}

    def stages(self) -> list[dict[str, Any]]:
        """The stage times of one training step, forward then backward; only the native engine records them."""
        found = []
        self.layer.record_stages()
        for step in (self.forward_saving, self.backward):
            step()
            found.append(asdict(self.layer.stage_times()))
        self.layer.record_stages(False)
        return found

    def release(self) -> None:
        """Give back the results and the layer's working memory."""
        self.made.clear()
        self.layer.clear_sft_buffer_cache()


def map_tensor(path: Path, dtype: str, shape: list[int]) -> Any:
    """The tensor stored raw at `path`, mapped; writes to it do not reach the file."""
    import torch

    size = math.prod(shape)
    kind = getattr(torch, dtype)
    if size == 0:
        return torch.empty(shape, dtype=kind)
    return torch.from_file(str(path), shared=False, size=size, dtype=kind).view(shape)


def resident_bytes() -> int:
    """Resident memory of this process in bytes, after the allocators gave back their unused memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class PeerHost:
    """One engine, loaded by the module of a peer, and the requests to it."""

    def __init__(self, module: ModuleType, load_module: Callable[[Path], ModuleType]) -> None:
        self.module, self.load_module = module, load_module
        self.engine: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        action: Callable[..., dict[str, Any]] = getattr(self, f"do_{request.pop('do')}")
        return action(**request)

    def do_load(self, directory: str, threads: int, isa: str, options: dict[str, str]) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        inputs = BenchInputs(Path(directory), threads, isa, options, self.load_module)
        before = resident_bytes()
        start = time.perf_counter_ns()
        loaded = self.module.load(inputs)
        took = time.perf_counter_ns() - start
        self.engine = ContractPeer(loaded, inputs) if hasattr(loaded, "forward_sft") else loaded
        self.tokens = [inputs.tensors[name] for name in TOKENS]
        self.order = list(range(len(self.tokens[0])))
        for name in BASE_NAMES:
            del inputs.tensors[name]
        # an engine may prepare weights only when a token needs them
        self.engine.forward()
        release = getattr(self.engine, "release", None)
        if release is not None:
            release()
        package = getattr(self.module, "PACKAGE", "")
        version = str(getattr(importlib.import_module(package), "__version__", "")) if package else ""
        about = {"version": version, "threads": str(threads), **self.engine.about, **inputs.about}
        return {"ns": took, "resident": resident_bytes() - before, "about": about}

    def _shuffle(self) -> None:
        """Bring the tokens into another order, in place: an engine that keeps results has none for this call."""
        order = random.SystemRandom().sample(range(len(self.order)), len(self.order))
        for tensor in self.tokens:
            tensor.copy_(tensor[order])
        self.order = [self.order[place] for place in order]
        getattr(self.engine, "inputs_changed", bool)()

    def do_forward(self) -> dict[str, Any]:
        engine = self.engine
        self._shuffle()
        start = time.perf_counter_ns()
        engine.forward()
        return {"forward": time.perf_counter_ns() - start}

    def do_backward(self) -> dict[str, Any]:
        engine = self.engine
        self._shuffle()
        start = time.perf_counter_ns()
        engine.forward_saving()
        middle = time.perf_counter_ns()
        engine.backward()
        end = time.perf_counter_ns()
        return {"forward_saving": middle - start, "backward": end - middle}

    def do_stages(self) -> dict[str, Any]:
        return {"steps": self.engine.stages()}

    def do_write(self, directory: str) -> dict[str, Any]:
        import torch

        written = {}
        for name, tensor in self.engine.results().items():
            flat = tensor.detach().contiguous()
            if name in TOKEN_RESULTS and len(flat) == len(self.order):
                # as the tokens were given at first
                flat = flat[torch.tensor(self.order).argsort()]
            dtype = str(flat.dtype).removeprefix("torch.")
            flat.view(torch.uint8).numpy().tofile(os.path.join(directory, name))
            written[name] = {"dtype": dtype, "shape": list(flat.shape)}
        return {"tensors": written}

    def do_call(self, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"value": getattr(self.module, function)(**arguments)}
