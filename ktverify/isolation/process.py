"""A process that answers requests over a pipe, and how it ended when it did not. No torch here.

Comes in: a command that takes two file descriptors as its last arguments. Goes out: its answers, lines of JSON as dict,
or `EngineDied` with the signal and the last lines that it wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ktverify.errors import EngineDied

LAST_LINES = 12
_TAIL = 1 << 15
# all but the last two parts of a path in a traceback
_FOLDERS = re.compile(r'File "/(?:[^"/]+/)*(?=[^"/]+/[^"/]+")')


def how_it_ended(code: int) -> str:
    """-11 -> "died of SIGSEGV", 3 -> "ended with exit code 3"."""
    if code == -signal.SIGKILL:
        return "died of SIGKILL (the system may have run out of memory)"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def last_lines(log: IO[bytes]) -> list[str]:
    """The last lines of a file that a process writes its output to, without blank ones.

    Of a fault handler's dump: file names without the folders that are this machine's, no list of extension modules.
    """
    size = os.fstat(log.fileno()).st_size
    tail = os.pread(log.fileno(), _TAIL, max(0, size - _TAIL)).decode(errors="replace")
    lines = [line.rstrip() for line in tail.splitlines() if line.strip()]
    return [_FOLDERS.sub('File "', line) for line in lines if not line.startswith("Extension modules:")]


class Process:
    """A process that answers. Its output goes to a file whose end tells how it died. Not for several threads.

    own_session: False where it looks after Ctrl-C itself, and is to be ended with the group of this process.
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
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        request_read, self._request = os.pipe()
        self._answer, answer_write = os.pipe()
        self._pending = b""
        self._process = subprocess.Popen(
            [*command, str(request_read), str(answer_write)],
            env=dict(environment),
            pass_fds=(request_read, answer_write),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            # Ctrl-C is for the controller: it ends its engines in order
            start_new_session=own_session,
        )
        os.close(request_read)
        os.close(answer_write)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request. EngineDied when there is none after timeout_s, or the process has ended."""
        deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        view = memoryview(json.dumps(request).encode("utf-8") + b"\n")
        try:
            while view:
                view = view[os.write(self._request, view) :]
            answer: dict[str, Any] = json.loads(self._read_line(deadline))
        except (EOFError, BrokenPipeError):
            raise EngineDied(self._end()) from None
        except TimeoutError:
            self._process.kill()
            raise EngineDied(f"no answer after {self.timeout_s:.0f} s; {self._end()}") from None
        return answer

    def _read_line(self, deadline: float | None) -> bytes:
        while b"\n" not in self._pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answer], [], [], left)
            if not ready:
                raise TimeoutError
            part = os.read(self._answer, 1 << 16)
            if not part:
                raise EOFError
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _end(self) -> str:
        how = how_it_ended(self._process.wait())
        last = self.last_line()
        return f"{how}; last line: {last}" if last else f"{how} without a word"

    def last_line(self) -> str:
        """The last line that the process wrote; of a fault handler's dump only the first, where nothing came before."""
        lines = [line.strip() for line in last_lines(self._log)]
        fault = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
        told = lines[:fault] or lines[: fault + 1]
        return told[-1][:200] if told else ""

    def last_words(self) -> str:
        """The last lines that the process wrote, as they stand."""
        return "\n".join(last_lines(self._log)[-LAST_LINES:])

    def cpu_ns(self) -> int:
        """Processor time that all of its threads have had; 0 where the system does not tell."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
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
