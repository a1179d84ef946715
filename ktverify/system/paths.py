"""Where things are: the checkout that this package belongs to, and the directory for reports."""

from __future__ import annotations

from pathlib import Path

# the folder that contains `ktverify/`: a checkout, or site-packages
ROOT = Path(__file__).resolve().parents[2]


def reports_dir() -> Path:
    """`reports/` of the checkout that contains the current directory; `reports/` in the current directory otherwise."""
    here = Path.cwd()
    for directory in (here, *here.parents):
        if (directory / "suites").is_dir() and (directory / "pyproject.toml").is_file():
            return directory / "reports"
    return here / "reports"
