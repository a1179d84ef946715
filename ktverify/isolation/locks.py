"""Locks on computing, between all test processes of this machine.

Computing tests share one lock and a timing test takes it exclusively, so a time is never measured while another test
computes. Tests that take gigabytes take turns. The locks are flocks, so a process that dies releases them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set for a process that computes under the lock of its parent: it must not wait for that lock itself.
HELD_BY_PARENT = "KTVERIFY_SUITES_LOCK_HELD"


def open_lock_dir() -> int:
    """A descriptor of the folder of the lock files: one per user and machine, for this user alone.

    Two runs of a user then do not spoil each other's timings. The folder for temporary files is everybody's, so
    PermissionError where the name is taken: by a link, a file, or a folder of another user.
    """
    me = os.geteuid()
    folder = Path(tempfile.gettempdir()) / f"ktverify-locks-{me}"
    advice = "remove it, or set TMPDIR to a folder of your own"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        # a folder that is opened stays the one that is checked
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise PermissionError(f"{folder}, for locks, is no folder of user {me} ({error.strerror}): {advice}") from None
    owner = os.fstat(descriptor).st_uid
    if owner != me:
        os.close(descriptor)
        raise PermissionError(f"{folder}, for locks, belongs to user {owner}, this process is user {me}'s: {advice}")
    os.fchmod(descriptor, 0o700)
    return descriptor


@contextlib.contextmanager
def _flock(name: str, operation: int) -> Iterator[None]:
    if os.environ.get(HELD_BY_PARENT):
        yield
        return
    folder = open_lock_dir()
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        fcntl.flock(fd, operation)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def computing(*, alone: bool = False) -> Iterator[None]:
    """Take the lock on computing: shared with other tests, or `alone` for a test that measures time.

    Readers of a flock can starve its writer. The turnstile prevents that: a test that needs the lock alone keeps the
    turnstile locked until it is done, so that no other test begins while it waits for those that compute.
    """
    with contextlib.ExitStack() as held:
        if alone:
            held.enter_context(_flock("turnstile", fcntl.LOCK_EX))
            held.enter_context(_flock("computing", fcntl.LOCK_EX))
        else:
            with _flock("turnstile", fcntl.LOCK_SH):
                held.enter_context(_flock("computing", fcntl.LOCK_SH))
        yield


def big() -> contextlib.AbstractContextManager[None]:
    """Take the lock of the tests that take gigabytes. Take it before `computing`, never inside it."""
    return _flock("big", fcntl.LOCK_EX)


@contextlib.contextmanager
def lent_to_children() -> Iterator[None]:
    """Processes started in the body compute under the lock of this process."""
    before = os.environ.get(HELD_BY_PARENT)
    os.environ[HELD_BY_PARENT] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[HELD_BY_PARENT]
        else:
            os.environ[HELD_BY_PARENT] = before
