"""The engines of `bench shapes`, and the process of each. Imports no torch.

Input: names, or paths of files like those in peers/. Output: `Engine`, and `EngineProcess`, which answers requests
or raises `EngineDied` or `Unsupported`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktverify.errors import EngineDied, Unsupported
from ktverify.isolation import host
from ktverify.isolation.host import module_at
from ktverify.isolation.process import AnsweringProgram, environment_of, own_environment
from ktverify.system import optional_peers
from ktverify.system.files import expand
from ktverify.system.instruction_sets import INSTRUCTION_SETS

HOST = f"{Path(__file__).with_name('host.py')}:PeerHost"
PEERS = Path(__file__).with_name("peers")
OWN = "native"
KNOWN = (OWN, "kt_kernel", "torch_loop", "torch_grouped_mm", "vllm")
ON_REQUEST = (
    "transformers_experts", "native_fp8", "native_int8", "native_int4", "native_mxfp4",
    "kt_kernel_fp8", "kt_kernel_int8", "kt_kernel_int4", "other_build",
)  # fmt: skip

# variables that keep an engine from a newer instruction set than the requested one; the native engine gets an argument
_PEER_VARIABLES = {isa.name: isa.peer_variables for isa in INSTRUCTION_SETS}


@dataclass(frozen=True)
class Engine:
    """One engine. missing: the reason why it cannot run, "" if it can.

    held: the most memory that loading takes, over the bf16 weights; lazy: over those of active experts only. bits: of a
    base weight.
    """

    name: str
    title: str
    file: Path
    held: float
    lazy: bool
    backward: bool
    lora: bool
    python: Path
    options: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    bits: int = 16


def find(names: Sequence[str], options: Mapping[str, str | None]) -> list[Engine]:
    """The engines of `names`, the native one first; all known engines without names.

    A name that ends in .py is the path of a file like those in peers/. ValueError for a wrong name or option.
    """
    wanted = list(dict.fromkeys([OWN, *(names or KNOWN)]))
    found = []
    for name in wanted:
        found.append(_engine(*_place(name), options))
    doubled = {engine.name for engine in found if [other.name for other in found].count(engine.name) > 1}
    if doubled:
        raise ValueError(f"two engines are called {', '.join(sorted(doubled))}; rename a file")
    return found


def _place(name: str) -> tuple[Path, str]:
    """(file, format of its base weights' codes, "" for bf16) of an engine. ValueError for a name of none."""
    path = Path(expand(name)).resolve() if name.endswith(".py") else PEERS / f"{name}.py"
    if path.is_file() and path.stem != "__init__":
        return path, ""
    stem, _, format = name.rpartition("_")
    path = PEERS / f"{stem}.py"
    if path.is_file() and format in getattr(module_at(path), "FORMATS", ()):
        return path, format
    known = ", ".join((*KNOWN, *ON_REQUEST))
    raise ValueError(f"no engine is called {name!r}; there are {known}, or the path of a .py file")


def _engine(path: Path, format: str, options: Mapping[str, str | None]) -> Engine:
    module = module_at(path)
    try:
        need, python, more, missing = module.NEEDS, Path(sys.executable), {"format": format} if format else {}, ""
        if need:
            place, missing = optional_peers.find(need, options)
            if place is not None and need == "kt_python":
                python = place
            elif place is not None:
                more[need] = str(place)
        bits, held = module.FORMATS[format] if format else (16, module.HELD)
        return Engine(
            name=f"{path.stem}_{format}" if format else path.stem,
            title=f"{module.TITLE} {format.upper()}" if format else module.TITLE,
            file=path,
            held=held,
            lazy=module.LAZY,
            backward=module.BACKWARD,
            lora=module.LORA,
            python=python,
            options=more,
            missing=missing,
            bits=bits,
        )
    except AttributeError as error:
        raise ValueError(f"{path} is no engine: {error}") from None


def host_command(python: str, server: str, argument: str) -> list[str]:
    """The command of host.py, which ends with the thread that starts it if that is the main thread."""
    # another thread, as one of a pool, may end before the engine that it started
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    return [python, host.__file__, server, argument, str(parent)]


class EngineProcess(AnsweringProgram):
    """A process with a PeerHost of `engine`."""

    def __init__(self, engine: Engine, *, threads: int, isa: str = "", timeout_s: float = 900.0) -> None:
        self.engine = engine
        command = host_command(str(engine.python), HOST, str(engine.file))
        super().__init__(command, environment(engine, threads=threads, isa=isa), timeout_s=timeout_s)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. EngineDied if there is none, or if the engine raised; Unsupported if it cannot."""
        answer = self.exchange({"do": do, **arguments})
        if not answer["ok"]:
            error = answer["error"]
            if error["declared"]:
                raise Unsupported(" ".join(error["text"].split())[:400])
            raise EngineDied(" ".join(f"{error['class']}: {error['text']}".split())[:400])
        result: dict[str, Any] = answer["result"]
        return result


def environment(engine: Engine, *, threads: int, isa: str) -> dict[str, str]:
    """The variables of an engine's process: the same threads for all engines, and no worker that spins while it waits,
    because the next engine needs its processor."""
    own = engine.python == Path(sys.executable)
    return {
        **(own_environment() if own else environment_of(str(engine.python))),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        **_PEER_VARIABLES.get(isa, {}),
    }
