"""`python -m ktverify.cli.start MODULE [ARGUMENT…]`: run the typer function `main` of MODULE.

Ctrl-C ends it with one line and exit code 130, also while torch is still being imported. Nothing heavy is imported
before that holds.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from ktverify.isolation.interrupt import INTERRUPTED


def main(module: str, arguments: list[str]) -> None:
    """Run the command of `module`; ends with SystemExit."""
    # a shell ignores it for what runs in the background of a script
    heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if heeded:
        # what is being imported may swallow a KeyboardInterrupt, and there is nothing yet to be ended in order
        signal.signal(signal.SIGINT, lambda *_: os._exit(_stopped()))
    import typer

    command = importlib.import_module(module).main
    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    try:
        typer.run(command)
    except SystemExit as ended:
        # what typer makes of a KeyboardInterrupt
        if ended.code == INTERRUPTED:
            _stopped()
        raise


def _stopped() -> int:
    print("stopped; nothing was written", file=sys.stderr, flush=True)
    return INTERRUPTED


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
