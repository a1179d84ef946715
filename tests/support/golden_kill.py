"""A regeneration of two goldens that kills its own process at a chosen moment, for a child process to run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from ktverify.judge import golden
from ktverify.judge import golden_regenerate as regeneration

MOMENTS = ("computing", "staged", "files moved", "manifest replaced")


def regenerate_until(moment: str, directory: str) -> None:
    """Regenerate odd_sizes and small in `directory`; SIGKILL once the step named by `moment` is done."""

    def die(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    compute, write_manifest = regeneration.compute, golden.write_manifest
    seen: list[object] = []

    def compute_once(case: Any) -> Any:
        seen.append(case)
        return compute(case) if len(seen) < 2 else die()

    def write_and_die(*arguments: Any) -> None:
        write_manifest(*arguments)
        die()

    steps = {
        "computing": ("compute", compute_once),
        "staged": ("_publish", die),
        "files moved": ("write_manifest", die),
        "manifest replaced": ("write_manifest", write_and_die),
    }
    setattr(regeneration, *steps[moment])
    regeneration.regenerate("odd_sizes,small", directory=Path(directory), force=True)
