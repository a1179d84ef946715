"""The command run: a script that was written for kt-kernel, on this engine."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer


def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(metavar="SCRIPT.py", help="a Python file; what follows are its arguments")],
    as_kt_kernel: Annotated[
        bool, typer.Option("--as-kt-kernel", help="answer imports of kt_kernel and of llamafactory's kt_moe")
    ] = False,
) -> None:
    """Run a script that imports kt_kernel, with this engine behind that name, in this process alone.

    docs/from-kt-kernel.md lists the names. An installed kt-kernel is not hidden: then the command is refused.

    \b
    Example:  python -m ktverify run --as-kt-kernel test_wrapper.py --mode all
    """
    if not as_kt_kernel:
        raise ValueError(f"run needs --as-kt-kernel; without it, python {script} does the same")
    if not script.is_file():
        raise ValueError(f"there is no script {script}")
    import ktverify.as_kt_kernel

    ktverify.as_kt_kernel.install()
    sys.argv = [str(script), *context.args]
    sys.path.insert(0, os.path.abspath(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception:  # the script's own, as python would show it
        traceback.print_exc()
        raise typer.Exit(1) from None
