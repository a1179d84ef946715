"""kt_kernel: kt-kernel 0.7.2 in a process of its own, under the Python that has it. Imports no torch.

`make peers` sets such a Python up; KTVERIFY_KT_PYTHON names another. adapter.py makes the calls there.
"""

from __future__ import annotations

from pathlib import Path

from ktverify.isolation.hosted import Hosted
from ktverify.system import optional_peers

ENGINE = "KtKernel"
_FOLDER = Path(__file__).parent


def _python() -> str:
    path, missing = optional_peers.find("kt_python", {})
    if path is None:
        raise ValueError(f"engine kt_kernel: {missing}")
    return str(path)


KtKernel = Hosted(f"{_FOLDER / 'adapter.py'}:KtKernel", _python, stand_alone=str(_FOLDER / "standalone.py"))
