"""What `pip install .` installs: every file of the package, and commands that run where there is no clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import typer

from ktverify.system import files
from ktverify.system.files import ROOT
from tests.support.command_line import every_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of a wheel built from the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", folder, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python that has the wheel and what it requires, and neither the clone nor its editable installation."""
    required = dict.fromkeys(str(Path(module.__file__ or "").parents[1]) for module in (torch, typer, pytest))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *required])}
    # -S: the editable installation's import hook is a .pth file
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_has_every_file_of_the_package(installed: Path) -> None:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "ktverify"], capture_output=True, text=True, check=True)
    missing = [name for name in listed.stdout.splitlines() if not (installed / name).is_file()]
    assert missing == []
    assert list((installed / "ktverify").glob("_native*.so"))
    assert not [name for name in ("golden", "reports", "suites", "tests") if (installed / name).exists()]


HELP = """
import importlib, pkgutil, sys
from typer.testing import CliRunner
import ktverify
from ktverify.cli.main import app

# what imports kt_kernel runs in an interpreter of its own
for module in pkgutil.walk_packages(ktverify.__path__, "ktverify."):
    if not module.name.endswith(("__main__", "kt_kernel.adapter", "kt_kernel.standalone")):
        importlib.import_module(module.name)
for words in {commands}:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output, (words, result.output)
"""


def test_every_module_can_be_imported_and_every_command_has_its_help(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", HELP.format(commands=[words for words, _ in every_command()]))
    assert done.returncode == 0, done.stderr
    done = run(installed, tmp_path, "-m", "ktverify.golden", "--help")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# what needs neither a model nor minutes; the exit code, and a part of the output
RUNS = {
    "doctor": (0, "avx2|scalar"),
    "list": (0, "small"),
    "repro small": (0, "PASS output"),
    "verify --case small": (0, "PASS"),
    "report": (2, "error: no run in"),
    "gate latest": (2, "error: no run in"),
}


@pytest.mark.parametrize("line", RUNS)
def test_a_command_without_a_clone(line: str, installed: Path, tmp_path: Path) -> None:
    code, text = RUNS[line]
    done = run(installed, tmp_path, "-m", "ktverify", *line.split())
    assert done.returncode == code, done.stdout + done.stderr
    assert any(part in done.stdout + done.stderr for part in text.split("|")), done.stdout + done.stderr


def test_the_source_distribution_has_what_a_build_needs(tmp_path: Path) -> None:
    program = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = {name for name in tracked if name.startswith(("ktverify/", "native/"))}
    assert needed | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_hints_name_what_can_be_typed_where_they_are_read(installed: Path, tmp_path: Path) -> None:
    program = "from ktverify.system import files as f; print(f.install_command('training'), f.RUN_SUITES, f.MAKE_PEERS)"
    done = run(installed, tmp_path, "-c", program)
    clone = "in a clone of ktverify"
    expected = f"pip install 'ktverify[training]' `pytest suites/ -n 4` {clone} `make peers` {clone}"
    assert done.stdout.strip() == expected, done.stderr
    assert files.install_command("training") == "pip install -c constraints.txt -e '.[training]'"
