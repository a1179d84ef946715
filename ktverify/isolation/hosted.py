"""An engine in a process of its own, under any Python: its factory, and layers whose calls go to that process.

One process serves one configuration of threads and processors, because some engines allow only one. A process that dies
raises EngineDied in the call that killed it and in every later call to its layers; the next layer gets a new process.
What a hosted engine writes into the tensors of a call is copied back; what it writes after its answer is not.
"""

from __future__ import annotations

import atexit
import builtins
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktverify.errors import EngineDied
from ktverify.isolation.host import Parcel, unpack
from ktverify.isolation.process import AnsweringProgram, environment_of
from ktverify.spec.names import LORA_NAMES
from ktverify.system.limits import processors

HOST = Path(__file__).with_name("host.py")
# idle processes that are kept for the next layer, because a start takes seconds
IDLE_KEPT = 2


@dataclass(frozen=True)
class Hosted:
    """A factory of layers in another process.

    spec: "path/to/file.py:attribute" or "package.module:attribute", as the other interpreter finds it. python: that
    interpreter, or a function that returns it and raises ValueError where there is none; None is this one. stand_alone:
    the path of a script that makes one case's calls without ktverify; see ktverify/reproducer/bundle.py.
    """

    spec: str
    python: str | Callable[[], str] | None = None
    stand_alone: str | None = None

    def check(self) -> str:
        """The interpreter. ValueError where there is none."""
        python = self.python() if callable(self.python) else self.python or sys.executable
        if not Path(python).is_file():
            raise ValueError(f"{python!r} is no file; the engine {self.spec} takes the path of a Python")
        return python

    def __call__(self, **arguments: Any) -> HostedLayer:
        threads = (arguments.get("cpuinfer_threads"), arguments.get("threadpool_count"))
        key = (self.spec, self.check(), repr(threads), (*sorted(os.sched_getaffinity(0)), processors()))
        return HostedLayer(_host_of(key), arguments)


class _Host:
    """A process, and which of its layers were freed."""

    def __init__(self, spec: str, python: str) -> None:
        # no time limit: the process that started this one limits it
        self._process = AnsweringProgram(
            host_command(python, "", spec), environment_of(python), timeout_s=None, own_session=False
        )
        self._lock = threading.Lock()
        self.layers = 0
        self.dropped: list[int] = []
        self.died = ""

    def ask(self, do: str, *given: Any) -> Any:
        """The answer of the host. Raises the engine's exception, or EngineDied."""
        with closing(Parcel(given)) as parcel:
            return self.send(do, parcel, do if do != "call" else str(given[1]))

    def send(self, do: str, parcel: Parcel, what: str) -> Any:
        """As ask, with packed arguments; `what` is the call's name in an error."""
        with self._lock:
            if self.died:
                raise EngineDied(f"{what}: the engine's process is gone: {self.died}")
            drop = self.dropped[:]
            try:
                answer = self._process.exchange({"do": do, "drop": drop, "given": parcel.description})
            except EngineDied as died:
                self.died = str(died)
                how, words = self.died.partition("; last line")[0], self._process.log.last_words()
                raise EngineDied(f"{what}: the engine's process {how}; last words:\n{words}") from None
            del self.dropped[: len(drop)]
            self.layers -= len(drop)
            if answer["ok"]:
                return unpack(answer["result"])
        error = answer["error"]
        kind = getattr(builtins, error["builtin"])
        raise (kind if error["class"] == error["builtin"] else type(error["class"], (kind,), {}))(error["text"])

    @property
    def idle(self) -> bool:
        return bool(self.died) or self.layers <= len(self.dropped)

    def close(self) -> None:
        self._process.close()


def host_command(python: str, server: str, argument: str) -> list[str]:
    """The command of host.py, which ends with the thread that starts it if that is the main thread."""
    # another thread, as one of a pool, may end before the layers that it made
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    return [python, str(HOST), server, argument, str(parent)]


_hosts: dict[tuple[Any, ...], _Host] = {}


def _host_of(key: tuple[Any, ...]) -> _Host:
    """The living process for a configuration, started where there is none; all but the newest idle ones end."""
    host = _hosts.pop(key, None)
    if host is not None and host.died:
        host.close()
        host = None
    if host is None:
        idle = [other for other, there in _hosts.items() if there.idle]
        for other in idle[: max(0, len(idle) - IDLE_KEPT)]:
            _hosts.pop(other).close()
        host = _Host(key[0], key[1])
    _hosts[key] = host
    return host


@atexit.register
def _close_all() -> None:
    while _hosts:
        _hosts.popitem()[1].close()


class HostedLayer:
    """A layer of a hosted engine, with KTMoEWrapper's methods; shapes and dtypes as in docs/contract.md."""

    def __init__(self, host: _Host, arguments: dict[str, Any]) -> None:
        self._host = host
        self._number: int = host.ask("build", arguments)
        host.layers += 1
        weakref.finalize(self, host.dropped.append, self._number).atexit = False
        self._shared: dict[str, Any] = {}
        self.grad_weights: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._host.ask("attribute", self._number, name)

    def load_weights_from_tensors(self, *given: Any, **named: Any) -> None:
        self._host.ask("call", self._number, "load_weights_from_tensors", given, named)

    def init_lora_weights(self, *given: Any, **named: Any) -> None:
        """From now on the parameters are tensors in shared memory, so an optimizer's step needs no copy."""
        _, given, named = self._shared_call("init_lora_weights", given, named)
        self._shared = dict(zip(LORA_NAMES, given, strict=False)) | named
        for name, tensor in self._shared.items():
            setattr(self, name, tensor)

    def _shared_call(self, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any, Any]:
        """The answer of a call, and its arguments as tensors in memory that the engine shares."""
        with closing(Parcel((self._number, method, given, named))) as parcel:
            return self._host.send("call", parcel, method), *unpack(parcel.description)[2:]

    def update_lora_weights(self) -> None:
        present = {name: self.__dict__[name] for name in self._shared}
        exchanged = {name: tensor for name, tensor in present.items() if tensor is not self._shared[name]}
        self._host.ask("update", self._number, exchanged)

    def forward_sft(self, *given: Any, **named: Any) -> Any:
        return self._on_tokens("forward_sft", given, named)

    def backward(self, *given: Any, **named: Any) -> Any:
        result, self.grad_weights = self._on_tokens("backward", given, named)
        return result

    def _on_tokens(self, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A call with small arguments: what the engine writes into them is copied to the caller's tensors."""
        result, after, named_after = self._shared_call(method, given, named)
        for mine, theirs in [*zip(given, after, strict=True), *((named[key], named_after[key]) for key in named)]:
            _copy_back(mine, theirs)
        return result

    def clear_sft_buffer_cache(self) -> None:
        self._host.ask("call", self._number, "clear_sft_buffer_cache", (), {})


def _copy_back(mine: Any, theirs: Any) -> None:
    """Copy a CPU tensor's bytes back if the other process changed them."""
    import torch

    if not isinstance(mine, torch.Tensor) or mine.device.type != "cpu" or mine.numel() == 0:
        return
    before, after = mine.detach(), theirs.detach()
    as_bytes = [tensor.contiguous().view(torch.uint8) for tensor in (before, after)]
    if not torch.equal(*as_bytes):
        before.copy_(after)
