"""kt_kernel: kt-kernel 0.7.2, in a process of its own under the Python that has it. The calls stand in hosted/.

`make peers` sets such a Python up; KTVERIFY_KT_PYTHON names another. No torch here.
"""

from __future__ import annotations

from pathlib import Path

from ktverify import places
from ktverify.hosting import Hosted

HOSTED = Path(__file__).with_name("hosted")


def _python() -> str:
    path, missing = places.find("kt_python", {})
    if path is None:
        raise ValueError(f"engine kt_kernel: {missing}")
    return str(path)


KtKernel = Hosted(f"{HOSTED / 'kt_kernel.py'}:KtKernel", _python, stand_alone=str(HOSTED / "kt_kernel_alone.py"))
