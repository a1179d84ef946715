"""The common core of all processes that the package starts: start, watch, end, last lines. Imports no torch.

`Running` is a process, how it ended, and how it is ended together with what it started; `Program` is one that runs a
command, with a `Log` of its output; `AnsweringProgram` also answers requests. `exchange` and `serve` are for two
processes of this package.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ktverify.errors import EngineDied, EngineTimeout, RemoteError
from ktverify.system.files import ROOT
from ktverify.system.printable import shown

if TYPE_CHECKING:
    import psutil
    from pydantic import BaseModel

# seconds for a process that has no more to do
WAIT_S = 10.0
_POLL_S = 0.005
# seconds between two looks of a process that waits for a reply at the one that it waits for
_WATCH_S = 0.05
_LAST_LINES = 12
_TAIL, _MOST_OF_A_LINE = 1 << 15, 300  # bytes, characters: of a longer line the middle is left out
# a line of a fault handler's dump; one of them in this package's code that calls engines
_FRAME = re.compile(r'^  File "[^"]*", line \d+ in ')
_CALLER = re.compile(rf'^  File "{re.escape(str(Path(__file__).parents[1]))}/(?!engines/(?!run)|mutants/)')
# all but the last two parts of a path in a traceback
_FOLDERS = re.compile(r'File "/(?:[^"/]+/)*(?=[^"/]+/[^"/]+")')


# ---- environments


def environment_of(python: str = sys.executable) -> dict[str, str]:
    """This process's variables, for another `python` without those that lead to packages of this one."""
    foreign = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in foreign}


def own_environment() -> dict[str, str]:
    """This process's variables, with this ktverify first on PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


# ---- how a process ends


def how_it_ended(code: int) -> str:
    """-11 -> "died of SIGSEGV", 3 -> "ended with exit code 3"."""
    if code == -signal.SIGKILL:
        return "died of SIGKILL (the system may have run out of memory)"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def processes_of(pid: int) -> list[psutil.Process]:
    """The process and its living descendants."""
    import psutil

    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def children_of(pid: int | str) -> list[int]:
    """The pids of a process's children."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as listed:
                found += [int(child) for child in listed.read().split()]
    return found


def resident_of(pid: int) -> int:
    """Bytes in RAM of the process and its descendants; shared pages count for each of them."""
    # not by psutil, which reads of all processes: a call is watched twenty times a second
    pages, waiting = 0, [pid]
    while waiting:
        each = waiting.pop()
        waiting += children_of(each)
        with contextlib.suppress(OSError), open(f"/proc/{each}/statm", encoding="ascii") as sizes:
            pages += int(sizes.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def end_group(pid: int) -> None:
    """SIGKILL to the process group that `pid` leads, if there is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def reap(pid: int) -> int | None:
    """The exit code of child `pid`, None while it runs. The group that it leads is ended first.

    Until the child is reaped, the system gives its number to no other process.
    """
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    end_group(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Running:
    """A process that this one, or its fork server, started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def _reap(self) -> int | None:
        return reap(self.pid)

    def poll(self) -> int | None:
        """Its exit code, minus the signal's number if a signal ended it; None while it runs."""
        if self._code is None:
            self._code = self._reap()
        return self._code

    def wait(self, timeout: float | None = None) -> int | None:
        """poll() once it has ended; None where it still runs after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        return code

    def end(self) -> None:
        """End it and all that it started, at once. A process that the kernel does not end in time is left."""
        if self.poll() is None:
            for process in processes_of(self.pid)[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            end_group(self.pid)
            # it may not lead a group yet
            os.kill(self.pid, signal.SIGKILL)
            self.wait(WAIT_S)

    def how(self) -> str:
        """How a process ended that no longer answers; one that has only closed its connection is ended."""
        code = self.wait(WAIT_S)
        if code is None:
            self.end()
            return "closed its pipe and lived on"
        return how_it_ended(code)


# ---- what a process writes


def shown_lines(output: bytes) -> list[str]:
    """The lines of an output as they are shown: without blank ones.

    Of a fault handler's dump: file names without this machine's folders, of each thread only what is above this
    package's own code, and no list of extension modules.
    """
    found, below = [], False
    for line in (line.rstrip() for line in output.decode(errors="replace").splitlines() if line.strip()):
        below = bool(_FRAME.match(line)) and (below or bool(_CALLER.match(line)))
        if not below and not line.startswith("Extension modules:"):
            found.append(shown(_FOLDERS.sub('File "', line), _MOST_OF_A_LINE))
    return found


def last_words(output: bytes) -> str:
    """The last lines of an output, as text."""
    return "\n".join(shown_lines(output[-_TAIL:])[-_LAST_LINES:])


class Log:
    """A temporary file for the output of a process."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._since = 0

    def fileno(self) -> int:
        return self._file.fileno()

    def forget(self) -> None:
        """What was written until now is not among the last lines."""
        self._since = os.fstat(self.fileno()).st_size

    def text(self) -> str:
        """All of the output."""
        return os.pread(self.fileno(), os.fstat(self.fileno()).st_size, 0).decode(errors="replace")

    def lines(self) -> list[str]:
        """The last lines; see shown_lines."""
        size = os.fstat(self.fileno()).st_size
        return shown_lines(os.pread(self.fileno(), _TAIL, max(self._since, size - _TAIL)))

    def last_line(self) -> str:
        """The last line; of a fault handler's dump only the first, where no other output came before."""
        lines = [line.strip() for line in self.lines()]
        fault = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
        found = lines[:fault] or lines[: fault + 1]
        return found[-1][:200] if found else ""

    def last_words(self) -> str:
        """The last lines, as text."""
        return "\n".join(self.lines()[-_LAST_LINES:])

    def close(self) -> None:
        self._file.close()


# ---- commands


class Program(Running):
    """A running command. Its output goes to `log`; stdout=subprocess.PIPE gives only that of stderr.

    It leads a session of its own, so that Ctrl-C reaches only the process that started it, which then ends it.
    own_session=False: it stays in this process's group, ignores Ctrl-C itself, and is ended with that group.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
        own_session: bool = True,
    ) -> None:
        self.log = Log()
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=self.log.fileno() if stdout is None else stdout,
            stderr=self.log.fileno(),
            start_new_session=own_session,
        )
        super().__init__(self._process.pid)

    def _reap(self) -> int | None:
        self._process.returncode = super()._reap()
        return self._process.returncode

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None  # a pipe was asked for
        return self._process.stdout

    def close(self) -> None:
        """End it at once: it keeps nothing that matters."""
        self.end()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self.log.close()


class AnsweringProgram(Program):
    """A command that answers requests over a connection, whose descriptor is its last argument; see host.py.

    For one thread at a time. timeout_s: seconds for one answer, None for no limit.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        timeout_s: float | None,
        own_session: bool = True,
    ) -> None:
        self.timeout_s = timeout_s
        self._connection, theirs = Pipe()
        with theirs:
            fd = theirs.fileno()
            super().__init__([*command, str(fd)], environment, pass_fds=[fd], own_session=own_session)

    def exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request. EngineDied where the process ended, EngineTimeout where it did not answer."""
        try:
            self._connection.send(request)
            if self._connection.poll(self.timeout_s):
                answer: dict[str, Any] = self._connection.recv()
                return answer
        except (EOFError, OSError):
            raise EngineDied(f"{self.how()}; last line: {self.log.last_line() or 'none'}") from None
        self.end()
        text = f"no answer after {self.timeout_s:.0f} s, ended with SIGKILL"
        raise EngineTimeout(f"{text}; last line: {self.log.last_line() or 'none'}")

    def cpu_ns(self) -> int:
        """Processor time of all its threads in nanoseconds; 0 where the system does not report it."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):
                total += int(task.read_text(encoding="ascii").split()[0])
        return total

    def close(self) -> None:
        self._connection.close()
        super().close()


def lines_of(module: str, request: BaseModel) -> Generator[str, None, None]:
    """The lines that `python -m module REQUEST` prints in a fresh process, as they come; REQUEST is JSON.

    RuntimeError, with the last line of its stderr, where it ends with another code than 0. It ends with the caller.
    """
    command = [sys.executable, "-m", module, request.model_dump_json()]
    program = Program(command, own_environment(), stdout=subprocess.PIPE)
    try:
        for line in program.stdout:
            yield line.decode()
        if code := program.wait():
            last = program.log.lines()[-1:] or ["no output"]
            raise RuntimeError(f"the measuring process ended with {code}: {last[0]}")
    finally:
        program.close()


# ---- requests and replies, pickled, between two processes of this package


def exchange(connection: Connection, request: object, watch: Callable[[], bool]) -> Any:
    """The reply to a request, for `value_of`. EOFError where the other process has ended.

    watch: called while there is no reply. False means that the process has ended: a process that it started may still
    have the other end open.
    """
    try:
        connection.send_bytes(pickle.dumps(request))
        while not connection.poll(_WATCH_S):
            if not watch() and not connection.poll():
                raise EOFError
        return pickle.loads(connection.recv_bytes())
    except OSError:
        raise EOFError from None


def serve(connection: Connection, answer: Callable[[Any], Any]) -> None:
    """Reply `answer(request)` to each request until the other end closes."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send_bytes(_reply(connection.recv_bytes(), answer))


def _reply(data: bytes, answer: Callable[[Any], Any]) -> bytes:
    loaded = len(sys.modules)
    try:
        # unpickling a function imports its module
        request = pickle.loads(data)
        if len(sys.modules) > loaded:
            # modules live as long as the process: a layer's release collects garbage, and need not look there
            gc.freeze()
        return pickle.dumps((answer(request),))
    except Exception as error:
        # of an error in an engine's process, the trace there
        trace = str(error.__cause__) if isinstance(error.__cause__, RemoteError) else traceback.format_exc()
        return pickle.dumps((portable(error), trace))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def value_of(reply: tuple[Any, ...]) -> Any:
    """The value in a reply. Raises the exception in it from a RemoteError; that itself where it cannot be pickled."""
    if len(reply) == 1:
        return reply[0]
    error, trace = reply
    if error is None:
        raise RemoteError(trace)
    raise error from RemoteError(trace)


def portable(error: BaseException) -> BaseException | None:
    """`error` if it survives a pickle round trip with its text, else None."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return copy if type(copy) is type(error) and str(copy) == str(error) else None
