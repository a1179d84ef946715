"""kt_kernel: kt-kernel 0.7.2, in a process of its own under the Python that has it. The calls stand in hosted/.

`make peers` sets such a Python up; KTVERIFY_KT_PYTHON names another. No torch here.
"""

from __future__ import annotations

from pathlib import Path

from ktverify.isolation.hosted import Hosted
from ktverify.system import optional_peers

HOSTED = Path(__file__).parent


def _python() -> str:
    path, missing = optional_peers.find("kt_python", {})
    if path is None:
        raise ValueError(f"engine kt_kernel: {missing}")
    return str(path)


KtKernel = Hosted(f"{HOSTED / 'adapter.py'}:KtKernel", _python, stand_alone=str(HOSTED / "standalone.py"))
