"""The engines that a run times: which there are, and the processes that they live in. No torch here.

Comes in: names, or paths of files like those in peers/. Goes out: `Engine`, and `Process`, which answers requests or
raises `Died`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ktverify.bench import places
from ktverify.bench.host import load_module

HOST = Path(__file__).with_name("host.py")
PEERS = Path(__file__).with_name("peers")
OWN = "native"
KNOWN = (OWN, "kt_kernel", "torch_loop", "torch_grouped_mm", "vllm")

# what keeps each engine from a newer instruction set than the one asked for; the native engine is told directly
ISA_VARIABLES: dict[str, dict[str, str]] = {
    "amx_bf16": {},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "KT_KERNEL_CPU_VARIANT": "avx512_bf16"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "KT_KERNEL_CPU_VARIANT": "avx2", "ATEN_CPU_CAPABILITY": "avx2"},
    "scalar": {},
}


class Died(RuntimeError):
    """An engine's process ended, fell silent, or its engine raised; one line that says how."""


@dataclass(frozen=True)
class Engine:
    """One engine. missing: why it cannot run.

    held: the most memory that loading takes, over the bf16 weights; lazy: those of active experts only.
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


def find(names: Sequence[str], options: Mapping[str, str | None]) -> list[Engine]:
    """The engines of `names`, the native one first; without names all that are known.

    A name ending in .py is a file like those in peers/. ValueError for an unknown name and a wrong option.
    """
    wanted = list(dict.fromkeys([OWN, *(names or KNOWN)]))
    found = []
    for name in wanted:
        path = Path(name).resolve() if name.endswith(".py") else PEERS / f"{name}.py"
        if not path.is_file() or path.stem == "__init__":
            raise ValueError(f"no engine is called {name!r}; there are {', '.join(KNOWN)}, or the path of a .py file")
        found.append(_engine(path, options))
    doubled = {engine.name for engine in found if [other.name for other in found].count(engine.name) > 1}
    if doubled:
        raise ValueError(f"two engines are called {', '.join(sorted(doubled))}; rename a file")
    return found


def _engine(path: Path, options: Mapping[str, str | None]) -> Engine:
    module: Any = load_module(path)
    try:
        need, python, more, missing = module.NEEDS, Path(sys.executable), {}, ""
        if need:
            place, missing = places.find(need, options)
            if place is not None and need == "kt_python":
                python = place
            elif place is not None:
                more[need] = str(place)
        return Engine(
            name=path.stem,
            title=module.TITLE,
            file=path,
            held=module.HELD,
            lazy=module.LAZY,
            backward=module.BACKWARD,
            lora=module.LORA,
            python=python,
            options=more,
            missing=missing,
        )
    except AttributeError as error:
        raise ValueError(f"{path} is no engine: {error}") from None


class Process:
    """A running host.py. Its output goes to a file whose last line tells how it died. Not for several threads."""

    def __init__(self, engine: Engine, *, threads: int, isa: str = "", timeout_s: float = 900.0) -> None:
        self.engine = engine
        self.timeout_s = timeout_s
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        request_read, self._request = os.pipe()
        self._answer, answer_write = os.pipe()
        self._pending = b""
        self._process = subprocess.Popen(
            [str(engine.python), str(HOST), str(engine.file), str(request_read), str(answer_write)],
            env=environment(engine, threads=threads, isa=isa),
            pass_fds=(request_read, answer_write),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            # Ctrl-C is for the controller: it ends its engines in order
            start_new_session=True,
        )
        os.close(request_read)
        os.close(answer_write)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request. Died when there is none."""
        line = json.dumps({"do": do, **arguments}).encode("utf-8") + b"\n"
        try:
            os.write(self._request, line)
            answer: dict[str, Any] = json.loads(self._read_line(time.monotonic() + self.timeout_s))
        except (EOFError, BrokenPipeError):
            raise Died(self._end()) from None
        except TimeoutError:
            self._process.kill()
            raise Died(f"no answer after {self.timeout_s:.0f} s; {self._end()}") from None
        if not answer.pop("ok"):
            raise Died(str(answer["error"])[:400])
        return answer

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._answer], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(self._answer, 1 << 16)
            if not part:
                raise EOFError
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _end(self) -> str:
        code = self._process.wait()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = self.last_line()
        return f"{how}; last line: {last}" if last else f"{how} without a word"

    def last_line(self) -> str:
        """The last line that the process wrote; of a fault handler's dump only the first, where nothing came before."""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), 1 << 15, max(0, size - (1 << 15))).decode(errors="replace")
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        fault = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
        told = lines[:fault] or lines[: fault + 1]
        return told[-1][:200] if told else ""

    def cpu_ns(self) -> int:
        """Processor time that all of its threads have had; 0 where the system does not tell."""
        total = 0
        for task in Path(f"/proc/{self._process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):
                total += int(task.read_text(encoding="ascii").split()[0])
        return total

    def close(self) -> None:
        """End the process at once: it keeps nothing that matters."""
        for descriptor in (self._request, self._answer):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._process.kill()
        self._process.wait()
        self._log.close()


def environment(engine: Engine, *, threads: int, isa: str) -> dict[str, str]:
    """The variables of an engine's process: the same threads for all, and no waiting worker that spins on a processor
    which another engine's turn needs."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        **ISA_VARIABLES.get(isa, {}),
    }
    if engine.python == Path(sys.executable):
        # where this ktverify comes from, for the native engine's file
        root = str(Path(__file__).resolve().parents[2])
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    else:
        variables.pop("PYTHONPATH", None)
        variables.pop("PYTHONHOME", None)
    return variables
