# Signatures of the compiled module; native/bind/module.cpp says what each does. Addresses are data_ptr() of tensors.
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# addresses by slot, row stride, column stride, disposable, addresses of scales, of zero points
_Source = tuple[Sequence[int], int, int, bool, Sequence[int], Sequence[int]]

def known_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def require_isa(name: str) -> None: ...
def why_not(name: str) -> str: ...
def emulate_amx() -> bool: ...
def emulated_instructions() -> int: ...
def allowed_processors() -> int: ...
def available_memory() -> int: ...
def read_system_below(root: str) -> None: ...
def memory_use(
    *,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    rank: int,
    parts: int,
    threads: int,
    isa: str,
    format: tuple[str, int, bool, str, bool],
    lora_fp32: bool,
    ids: Sequence[int],
) -> tuple[int, int, int, int]: ...
def clear_buffer_cache() -> None: ...

HUGE_PAGE: int

def gradient_memory(bytes: int, reuse: bool) -> tuple[npt.NDArray[np.uint8], bool]: ...
def read_rate(threads: int, bytes: int, passes: int) -> float: ...
def multiply_rate(isa: str, threads: int, seconds: float) -> float: ...
def kernels_of(isa: str) -> tuple[int, bool]: ...

class Products:
    def __init__(self, threads: int, bytes: int) -> None: ...
    def time(
        self,
        *,
        kernels: int,
        backward: bool,
        rows: int,
        n: int,
        k: int,
        matrices: int,
        window: int,
        check: bool = False,
    ) -> tuple[float, float, float, int]: ...

def compiler() -> str: ...

class Layer:
    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        hidden: int,
        intermediate: int,
        rank: int,
        scaling: float,
        parts: int,
        threads: int,
        max_rows: int,
        max_cache_depth: int,
        lora_backward: bool,
        isa: str,
    ) -> None: ...
    @property
    def saved_forwards(self) -> int: ...
    @property
    def lora_fp32(self) -> bool: ...
    @property
    def packed_experts(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def record_stages(self, on: bool) -> None: ...
    def stage_times(self) -> dict[str, Any]: ...
    def load_weights(
        self,
        gate: _Source,
        up: _Source,
        down: _Source,
        physical_map: Sequence[int],
        owner: object,
        format: tuple[str, int, bool, str, bool],
    ) -> int: ...
    def move_weights(self, name: int, gate: _Source, up: _Source, down: _Source) -> None: ...
    def unpack(self, expert: int, gate: int, up: int, down: int) -> bool: ...
    def update_lora(self, lora: Sequence[int], fp32: bool) -> None: ...
    def fingerprint(self, memory: Sequence[tuple[int, int]]) -> bytes: ...
    def forward(
        self, rows: int, x: int, ids: int, weights: int, output: int, save: bool, room: int, given_up: int
    ) -> int: ...
    def backward(
        self,
        rows: int,
        grad_output: int,
        grad_input: int,
        grads: Sequence[int],
        fp32: bool,
        grads_zero: bool,
        grad_weights: int,
        accumulate: bool,
        ticket: int,
        of_any_thread: bool,
    ) -> None: ...
    def drop(self, ticket: int) -> None: ...
