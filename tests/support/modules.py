"""Which modules an import loads, in a new interpreter."""

from __future__ import annotations

import subprocess
import sys

from ktverify.system.files import ROOT


def loaded_modules(statement: str) -> list[str]:
    """Top-level modules that a new interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()
