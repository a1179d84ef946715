"""An engine in a process of its own: its factory, and layers whose calls go to that process.

The judge's end of layers.py. What comes back is plain values and bytes (wire.py): the engine's code runs over there.
A process that dies raises EngineDied in the call that killed it and in every later call to its layers; the next layer
gets a new process. Arguments are copied: what an engine writes into its own changes nothing here, and `seen` brings it
back for the check that asks. A result that lies in an argument or an earlier result does so here too.
"""

from __future__ import annotations

import atexit
import os
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktverify.isolation import wire
from ktverify.isolation.calls import CONSTRUCTOR, IMPORT
from ktverify.isolation.engine_process import Host
from ktverify.isolation.process import resident_of
from ktverify.isolation.regions import trim
from ktverify.isolation.watcher import watcher
from ktverify.spec.names import BASE_NAMES, LORA_NAMES
from ktverify.system.files import expand
from ktverify.system.limits import processors

# parameters up to this many bytes reach the engine's memory at every call, larger ones with an update
_EVERY_CALL = 8 << 20
# the arguments that an error names
_ARGUMENTS = {
    "load_weights_from_tensors": (*BASE_NAMES, "physical_map"),
    "init_lora_weights": LORA_NAMES,
    "forward_sft": ("hidden_states", "expert_ids", "weights"),
    "backward": ("grad_output",),
}


def absolute(name: str, folder: str | os.PathLike[str] = "") -> str:
    """The name of an engine with an absolute path if it names a file, because not every process is in the user's
    directory. ~ and $VARIABLE are replaced.

    folder: where a relative path starts; the current directory if "".
    """
    place, colon, attribute = name.partition(":")
    if not place.endswith(".py"):
        return name
    return f"{os.path.abspath(os.path.join(folder, expand(place)))}{colon}{attribute}"


@dataclass(frozen=True)
class Hosted:
    """A factory of layers in another process.

    spec: "path/to/file.py:attribute" or "package.module:attribute", as the other interpreter finds it. python: that
    interpreter, or a function that returns it and raises ValueError where there is none; None is this one. stand_alone:
    the path of a script that makes one case's calls without ktverify; see ktverify/reproducer/bundle.py. loader: the
    spec of a function of this package that finds the factory in the other process; "" for one under another Python.
    In the three paths, ~ and $VARIABLE are replaced.
    """

    spec: str
    python: str | Callable[[], str] | None = None
    stand_alone: str | None = None
    loader: str = ""

    def __post_init__(self) -> None:
        spec: object = self.spec
        if not isinstance(spec, str):
            takes = "path/file.py:attribute or package.module:attribute"
            raise TypeError(f"spec is a {type(spec).__name__}; it takes text, {takes}")
        found: dict[str, Any] = {"spec": absolute(spec)}
        for name in ("python", "stand_alone"):
            given = getattr(self, name)
            found[name] = given if given is None or callable(given) else expand(os.fspath(given))
        self.__dict__.update(found)  # frozen

    def check(self) -> str:
        """The interpreter, "" for this one. ValueError where there is none."""
        python = self.python() if callable(self.python) else self.python or ""
        if python and not Path(python).is_file():
            raise ValueError(f"{python!r} is no file; the engine {self.spec} takes the path of a Python")
        return python

    def host(self, threads: Any = None) -> Host:
        """The process of this engine. threads: some engines under another Python allow one configuration only."""
        python = self.check()
        allowed = (*sorted(os.sched_getaffinity(0)), processors())
        return _host_of((self.loader, self.spec, python, threads if python else None, allowed))

    def facts(self) -> dict[str, Any]:
        """What the checks have to know of the factory; see registry.Facts. Raises what importing it did."""
        found: dict[str, Any] = self.host().ask("facts", IMPORT)
        return found

    def __call__(self, **arguments: Any) -> HostedLayer:
        threads = repr((arguments.get("cpuinfer_threads"), arguments.get("threadpool_count")))
        return HostedLayer(self.host(threads), arguments)


_hosts: dict[tuple[Any, ...], Host] = {}
# idle processes that are kept for the next layer, because another interpreter takes seconds to start
IDLE_KEPT = 2


def _host_of(key: tuple[Any, ...]) -> Host:
    """The living process for a configuration, started where there is none; all but the newest idle ones end."""
    host = _hosts.pop(key, None)
    if host is None or host.died:
        idle = [other for other, there in _hosts.items() if there.idle]
        for other in idle[: max(0, len(idle) - IDLE_KEPT)]:
            _hosts.pop(other).end("was idle")
        host = Host(watcher(), *key[:3])
    _hosts[key] = host
    return host


def end_soiled() -> None:
    """End the engines' processes whose global state is not as it was: no later check may compute in them."""
    for key, host in list(_hosts.items()):
        if host.died:
            del _hosts[key]
            continue
        try:
            soiled = host.changes()
        except Exception:
            soiled = ["no answer"]
        if soiled:
            host.end(f"was soiled: {', '.join(map(str, soiled))}")
            del _hosts[key]


def processes() -> list[int]:
    """The pids of the engines' living processes."""
    return [host.pid for host in _hosts.values() if not host.died]


def resident() -> int:
    """Resident bytes of the engine's process without its arguments; of this one where the engine computes here.

    What an allocator keeps without need does not count.
    """
    import psutil

    trim()
    living = [host for host in _hosts.values() if not host.died]
    for host in living:
        host.ask("trim", "memory")
    found = [psutil.Process(host.pid).memory_info() for host in living]
    return sum(each.rss - each.shared for each in found) if found else resident_of(os.getpid())


@atexit.register
def end_all() -> None:
    """End all engines' processes of this one, and what they started."""
    while _hosts:
        _hosts.popitem()[1].end("is over")


class HostedLayer:
    """A layer of a hosted engine, with KTMoEWrapper's methods; shapes and dtypes as in docs/contract.md."""

    def __init__(self, host: Host, arguments: dict[str, Any]) -> None:
        self._host = host
        self._number, accumulates, moves = host.ask("build", CONSTRUCTOR, arguments)
        host.layers += 1
        weakref.finalize(self, host.dropped.append, self._number).atexit = False
        self._shared: dict[str, Any] = {}
        self.grad_weights: Any = None
        if accumulates is True:
            # what asks for the argument looks at the signature
            self.backward = types.MethodType(_accumulating, self)  # type: ignore[method-assign]
        if moves is not True:
            # by it the checks know an engine that ignores a mask
            self.set_gpu_experts_mask = None  # type: ignore[method-assign, assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._host.ask("attribute", name, self._number, name)

    def load_weights_from_tensors(self, *given: Any, **named: Any) -> None:
        self._call("load_weights_from_tensors", given, named)

    def init_lora_weights(self, *given: Any, **named: Any) -> None:
        """From now on the given tensors are the parameters; their values reach the engine's memory with each call."""
        self._call("init_lora_weights", given, named)
        self._shared = dict(zip(LORA_NAMES, given, strict=False)) | named
        for name, tensor in self._shared.items():
            setattr(self, name, tensor)

    def update_lora_weights(self) -> None:
        exchanged = {}
        for name, shared in self._shared.items():
            present = self.__dict__[name]
            # also one whose memory was exchanged
            if present is not shared or (shared.numel() and self._host.number_of(shared) is None):
                exchanged[name] = present
        filled = self._parameters(update=True)
        self._host.ask("update", "update_lora_weights", self._number, exchanged, fill=filled, names=exchanged)

    def forward_sft(self, *given: Any, **named: Any) -> Any:
        return self._call("forward_sft", given, named)

    def backward(self, *given: Any, **named: Any) -> Any:
        result, has, weights = self._call("backward", given, named)
        if has:
            self.grad_weights = weights
        else:
            # reading it asks the engine, which says that there is none
            self.__dict__.pop("grad_weights", None)
        return result

    def load_weights(self, *given: Any, **named: Any) -> None:
        self._call("load_weights", given, named)

    def set_gpu_experts_mask(self, *given: Any, **named: Any) -> None:
        self._call("set_gpu_experts_mask", given, named)

    def clear_sft_buffer_cache(self) -> None:
        self._call("clear_sft_buffer_cache", (), {})

    def _call(self, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        names = dict(zip(_ARGUMENTS.get(method, ()), given, strict=False)) | named
        return self._host.ask("call", method, self._number, method, given, named, fill=self._parameters(), names=names)

    def _parameters(self, *, update: bool = False) -> dict[int, tuple[int, int]]:
        """The regions of the parameters, whose present values the engine's memory gets."""
        import torch

        found = {}
        for tensor in self._shared.values():
            number = self._host.number_of(tensor) if isinstance(tensor, torch.Tensor) else None
            if number is not None:
                found[number] = wire.region_of(tensor)
        total = sum(size for _, size in found.values())
        return found if update or total <= _EVERY_CALL else {}


def _accumulating(layer: HostedLayer, grad_output: Any, accumulate: bool = False) -> Any:
    return HostedLayer.backward(layer, grad_output, accumulate=accumulate)


def seen(layer: Any) -> None:
    """Copy what the engine wrote into its arguments and results of earlier calls into the caller's. For any layer."""
    if isinstance(layer, HostedLayer):
        layer._host.contents()


def written(layer: Any) -> None:
    """Copy what the caller wrote into results of earlier calls into the engine's memory. For any layer."""
    if isinstance(layer, HostedLayer):
        layer._host.hand_over()
