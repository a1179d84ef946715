"""Write chosen calls of a training's layers as files that `python -m ktverify replay` judges an engine on.

    KTVERIFY_CAPTURE=DIR python -m ktverify train CONFIG.yaml
    with capturing("DIR", calls="0,100:200:10"): ...

The file of a call has its routing, sizes and spread; see spec/captured.py. KTVERIFY_CAPTURE_CALLS chooses the calls of
each layer by number, from 0 (default: 0). KTVERIFY_CAPTURE_TENSORS=1 adds hidden_states and grad_output.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ktverify.spec.captured import Captured, spread_of, write
from ktverify.spec.cases import CUSTOM, Case
from ktverify.system.files import expand

if TYPE_CHECKING:
    from ktverify.engines.native.layer import KTMoEWrapper

VARIABLE = "KTVERIFY_CAPTURE"
CALLS_VARIABLE = f"{VARIABLE}_CALLS"
TENSORS_VARIABLE = f"{VARIABLE}_TENSORS"
_PART = re.compile(r"(\d+)(?::(\d*)(?::([1-9]\d*))?)?")


class Capture:
    """What writes chosen calls into a directory. calls: numbers and ranges FROM:TO[:STEP], TO excluded, with commas.
    tensors: also hidden_states and grad_output. ValueError for other `calls`."""

    def __init__(self, directory: str | os.PathLike[str], calls: str = "0", tensors: bool = False) -> None:
        self.directory, self.tensors = expand(os.fspath(directory)), tensors
        self._ranges = [_range(part.strip(), calls) for part in str(calls).split(",")]
        self._calls: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._broken = False

    def forward(
        self,
        engine: KTMoEWrapper,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        lora_dtype: torch.dtype,
    ) -> Captured | None:
        """Note a forward: hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32. Where this call is
        wanted, write it, and return it for `backward`."""
        with self._lock:
            call = self._calls[engine.layer_idx]
            self._calls[engine.layer_idx] += 1
        if not any(call in wanted for wanted in self._ranges):
            return None
        spec = engine.spec
        case = Case(
            name=CUSTOM,
            why=f"call {call} of layer {engine.layer_idx} of a training",
            num_experts=spec.num_experts,
            top_k=spec.num_experts_per_tok,
            hidden=spec.hidden_size,
            intermediate=spec.moe_intermediate_size,
            qlen=len(hidden_states),
            rank=spec.lora_rank,
            alpha=spec.lora_alpha,
            lora_dtype="float32" if lora_dtype == torch.float32 else "bfloat16",
            seed=1000 * engine.layer_idx + call % 1000,
        )
        found = Captured(
            case, engine.layer_idx, call, expert_ids, weights, {"hidden_states": spread_of(hidden_states)},
            {"hidden_states": hidden_states.clone()} if self.tensors else {},
        )  # fmt: skip
        self._write(found)
        return found

    def backward(self, noted: Captured, grad_output: torch.Tensor) -> None:
        """Write a noted call again, with what is known of its backward."""
        spread = {**noted.spread, "grad_output": spread_of(grad_output)}
        tensors = {**noted.tensors, "grad_output": grad_output.clone()} if self.tensors else {}
        self._write(replace(noted, spread=spread, tensors=tensors))

    def _write(self, captured: Captured) -> None:
        if self._broken:
            return
        try:
            write(captured, self.directory)
        except OSError as error:
            # a full disk must not end the training
            self._broken = True
            print(f"{VARIABLE}: {error}; no more calls are captured", file=sys.stderr, flush=True)


_given: list[Capture] = []


@contextlib.contextmanager
def capturing(directory: str | os.PathLike[str], *, calls: str = "0", tensors: bool = False) -> Iterator[None]:
    """Capture calls of all wrapped layers of this process in the body; see Capture."""
    _given.append(Capture(directory, calls, tensors))
    try:
        yield
    finally:
        _given.pop()


def current() -> Capture | None:
    """The innermost `capturing`, else what the environment asks for; None for neither."""
    if _given:
        return _given[-1]
    directory = os.environ.get(VARIABLE, "")
    if not directory:
        return None
    return _of_environment(directory, os.environ.get(CALLS_VARIABLE, "0"), os.environ.get(TENSORS_VARIABLE) == "1")


@functools.cache
def _of_environment(directory: str, calls: str, tensors: bool) -> Capture:
    return Capture(directory, calls, tensors)


def _range(part: str, calls: str) -> range:
    found = _PART.fullmatch(part)
    if not found:
        raise ValueError(f"the calls to capture ({CALLS_VARIABLE}) are {calls!r}; it takes such as 0,10,100:200:10")
    first, last, step = found.groups()
    if last is None:
        return range(int(first), int(first) + 1)
    return range(int(first), int(last) if last else sys.maxsize, int(step or 1))
