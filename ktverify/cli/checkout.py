"""What runs only in a clone of the repository: the commands whose work the suites do. No torch here.

Comes in: a module of the suites and its arguments. This process becomes it, for nothing here may import it; so its
exit code is the command's, and Ctrl-C has nobody else to reach.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from ktverify.system.paths import ROOT


def become(module: str, arguments: list[str]) -> NoReturn:
    """The command `main` of `module`, with the checkout as its directory. RuntimeError where there is no checkout."""
    if not (ROOT / "suites").is_dir():
        raise RuntimeError(f"this command needs a clone of the repository: there is no suites/ beside {ROOT.name}/")
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "ktverify.cli.start", module, *arguments])
