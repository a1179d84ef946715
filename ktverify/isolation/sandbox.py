"""What an engine's process may not do: read the stored answers, read or write a judge's memory, signal a judge.

Landlock (Linux 5.13, signals from 6.12) where the kernel has it; `landlock` says so. Without it an engine can open the
stored answers, and only the kernel's own rules about ptrace protect a judge. Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct

# include/uapi/linux/prctl.h, landlock.h; the numbers of the system calls are those of every architecture
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION, _BENEATH = 1, 1
_READ_FILE = 1 << 2
# to move or link a file into another folder: refused where it is not granted, whatever a ruleset is about
_REFER = 1 << 13
_SCOPE_SIGNAL = 1 << 1
_REFER_FROM, _SIGNALS_FROM = 2, 6  # the versions that have them

# folders whose files an engine's process may not open; the judge fills it
hidden: list[str] = []


def _call(number: int, *arguments: object) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments))


def landlock() -> int:
    """The version of Landlock that the kernel has, 0 for none."""
    return max(0, _call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)))


def hide_memory() -> None:
    """Processes of the same user can no longer read this one's memory, or trace it."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def show_memory() -> None:
    """The opposite of hide_memory."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)


def enter(folders: list[str]) -> bool:
    """Restrict this process and its descendants for good: they open no file below `folders`. False without Landlock.

    Landlock grants what lies below a folder and cannot take a part of it back. So what lies beside the way to a hidden
    folder is granted one by one: a file that is made directly on that way later cannot be read either.
    """
    version = landlock()
    if not version:
        return False
    folder_rights = _READ_FILE | (_REFER if version >= _REFER_FROM else 0)
    attributes = struct.pack("QQQ", folder_rights, 0, _SCOPE_SIGNAL)[: 24 if version >= _SIGNALS_FROM else 8]
    ruleset = _call(_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    try:
        for path in _beside([os.path.realpath(folder) for folder in folders]):
            _grant(ruleset, path, folder_rights)
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return _call(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0
    finally:
        os.close(ruleset)


def _beside(folders: list[str], root: str = "/") -> list[str]:
    """What is to be granted: all that is below `root`, but for what is below `folders`."""
    if root in folders:
        return []
    inside = [folder for folder in folders if folder.startswith(root.rstrip("/") + "/")]
    if not inside:
        return [root]
    found = []
    try:
        entries = sorted(os.listdir(root))
    except OSError:
        return []
    for entry in entries:
        found += _beside(inside, os.path.join(root, entry))
    return found


def _grant(ruleset: int, path: str, folder_rights: int) -> None:
    try:
        # a link is granted where it leads
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISLNK(mode):
            rule = struct.pack("=Qi", folder_rights if stat.S_ISDIR(mode) else _READ_FILE, fd)
            _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(fd)


def committed(folder: str) -> list[str]:
    """Where git keeps what is committed of a folder, as many copies of its files as there were commits; [] outside of
    a repository."""
    above = os.path.realpath(folder)
    while not os.path.exists(dot := os.path.join(above, ".git")):
        if above == os.path.dirname(above):
            return []
        above = os.path.dirname(above)
    with contextlib.suppress(OSError):
        if os.path.isfile(dot):  # of a worktree or a submodule
            with open(dot, encoding="utf-8") as link:
                dot = os.path.join(above, link.read().removeprefix("gitdir:").strip())
        if os.path.isfile(shared := os.path.join(dot, "commondir")):
            with open(shared, encoding="utf-8") as link:
                dot = os.path.join(dot, link.read().strip())
    return [os.path.realpath(os.path.join(dot, "objects"))]
