"""What `pip install .` installs: package, suites and goldens, commands that run without a clone, pytest's plug-in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import typer
import yaml
from scikit_build_core.build import build_sdist

from ktverify.runs.store import load
from ktverify.system import files
from ktverify.system.files import ROOT
from tests.support.command_line import every_command

pytestmark = pytest.mark.slow

MOST_BYTES = 12 * 2**20


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        name = build_sdist(str(folder))
    finally:
        os.chdir(before)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel and what it requires, and nothing of the clone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder, "install", "--no-deps", "--no-index", wheel],
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    # a .pth file in these folders, as that of an editable installation, is not read
    required = dict.fromkeys(str(Path(module.__file__ or "").parents[1]) for module in (torch, typer, pytest))
    (site / "required.pth").write_text("\n".join(required))
    script = folder / "bin" / "pytest"
    script.write_text(f"#!{folder}/bin/python\nimport pytest, sys\nsys.exit(pytest.main())\n")
    script.chmod(0o755)
    return folder / "bin" / "python"


def run(python: Path, cwd: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in `cwd`."""
    return started(python, cwd, str(python), *arguments, **more)


def started(python: Path, cwd: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A command in `cwd` with the scripts of the environment on its path; `more`: further variables."""
    own = ("PYTEST_", "PYTHON", "GITHUB_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(own)} | more
    variables["PATH"] = os.pathsep.join([str(python.parent), variables["PATH"]])
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=900)


# ---- what is in it


def test_the_wheel_has_every_file_and_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = ("ktverify", "suites", "golden", "examples")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", *folders], capture_output=True, text=True, check=True)
    wanted = [name for name in listed.stdout.splitlines() if not name.endswith(".gitignore")]
    missing = [name for name in wanted if f"ktverify/{name.removeprefix('ktverify/')}" not in names]
    assert missing == []
    assert [name for name in names if name.startswith("ktverify/_native") and name.endswith(".so")]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"ktverify"}
    assert wheel.stat().st_size < MOST_BYTES


def test_the_source_distribution_has_what_a_build_needs(wheel: Path) -> None:
    (archive,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = ("ktverify/", "native/", "suites/", "golden/", "examples/")
    needed = {name for name in tracked if name.startswith(folders) and not name.endswith(".gitignore")}
    assert needed | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_other_processors_get_the_scalar_kernels_alone(tmp_path: Path) -> None:
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    command = [cmake, "-S", str(ROOT / "native"), "-B", str(tmp_path), "-G", "Unix Makefiles", "-DKTV_PYTHON=OFF"]
    command += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.stem for path in (tmp_path / "CMakeFiles").glob("ktv_*.dir")] == ["ktv_scalar"]


# ---- commands


HELP = """
import importlib, pkgutil, sys
from typer.testing import CliRunner
import ktverify
from ktverify.cli.main import app

# what imports kt_kernel runs in an interpreter of its own; a test module is imported by pytest
for module in pkgutil.walk_packages(ktverify.__path__, "ktverify."):
    other = module.name.endswith(("__main__", "kt_kernel.adapter", "kt_kernel.standalone"))
    if not other and not module.name.startswith("ktverify.suites"):
        importlib.import_module(module.name)
for words in {commands}:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output, (words, result.output)
"""


def test_every_module_can_be_imported_and_every_command_has_its_help(python: Path, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-c", HELP.format(commands=[words for words, _ in every_command()]))
    assert done.returncode == 0, done.stderr
    done = run(python, tmp_path, "-m", "ktverify.golden", "--help")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# a program that has only what the core requires
CORE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("hypothesis", "jinja2", "matplotlib", "pytest", "xdist", "yaml", "transformers")))
sys.argv = ["ktverify", *{words}]
runpy.run_module("ktverify", run_name="__main__")
"""
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
def test_a_command_with_the_core_alone(line: str, python: Path, tmp_path: Path) -> None:
    code, text = RUNS[line]
    done = run(python, tmp_path, "-c", CORE.format(words=line.split()))
    assert done.returncode == code, done.stdout + done.stderr
    assert any(part in done.stdout + done.stderr for part in text.split("|")), done.stdout + done.stderr


def test_hints_name_what_can_be_typed_where_they_are_read(python: Path, tmp_path: Path) -> None:
    program = "from ktverify.system import files as f; print(f.install_command('training'), f.RUN_SUITES, f.MAKE_PEERS)"
    done = run(python, tmp_path, "-c", program)
    expected = (
        "pip install 'ktverify[training]' `pytest --pyargs ktverify.suites -n 4` `make peers` in a clone of ktverify"
    )
    assert done.stdout.strip() == expected, done.stderr
    assert files.install_command("training") == "pip install -c constraints.txt -e '.[training]'"
    assert files.suites("exact") == "suites/exact"


# ---- pytest

ENGINE = ROOT / "examples" / "engine_outside" / "my_engine.py"


def test_the_suites_judge_an_engine_of_the_current_folder(python: Path, tmp_path: Path) -> None:
    # a formula is wrong, so that there is something to repeat
    (tmp_path / "own.py").write_text(ENGINE.read_text().replace("lora_alpha / lora_rank", "2 * lora_alpha / lora_rank"))
    chosen = ["--pyargs", "ktverify.suites.forward", "ktverify.suites.contract", "--cases", "tiny", "-n", "1"]
    chosen += ["-k", "test_case or mode"]
    done = run(python, tmp_path, "-m", "pytest", *chosen, "--engine", "own:Engine")
    assert done.returncode == 1, done.stdout + done.stderr
    (directory,) = (tmp_path / "reports" / "runs").iterdir()
    made = load(directory)
    assert made.head is not None
    assert made.head.engine == "own:Engine"
    assert {(record.family, record.verdict) for record in made.accuracy} == {("forward", "FAIL")}
    assert made.accuracy[0].source == "golden"
    assert {record.family for record in made.checks} == {"contract"}
    assert "pytest --pyargs 'ktverify.suites.contract.test_refusals::test_refused[mode unknown]'" in done.stdout
    assert (directory / "report.html").is_file()


PLAIN = """
import sys

def test_it_is_light():
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"torch", "numpy", "typer", "psutil", "pydantic"}, loaded
    assert "ktverify.pytest_plugin.entry" in sys.modules

def test_it_has_their_option(pytestconfig):
    assert pytestconfig.getoption("--engine") == "v8"
"""
THEIRS = "def pytest_addoption(parser):\n    parser.addoption('--engine', default='v8')\n"


def test_other_peoples_tests_are_left_alone(python: Path, tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(PLAIN)
    (tmp_path / "conftest.py").write_text(THEIRS)
    done = run(python, tmp_path, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "-p", "no:anyio")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(python, tmp_path, "-m", "pytest", "--pyargs", "ktverify.suites")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: another plug-in or conftest.py has --engine, which ktverify.suites needs" in done.stderr
    assert not (tmp_path / "reports").exists()


OWN = """
from ktverify.checks.target import Target

def test_own(engine, target, case):
    assert engine == "torch_bf16" and target == Target("torch_bf16") and case.num_experts == 4
    assert target.run(case)["output"].shape == (case.qlen, case.hidden)
"""


def test_tests_of_ones_own_have_the_fixtures(python: Path, tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(OWN)
    case = "E=4,k=2,H=64,I=32,T=17,r=8,alpha=16@seed=1"
    done = run(python, tmp_path, "-m", "pytest", "-q", "--engine", "torch_bf16", "--case", case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "reports").exists()


# ---- an engine of one's own, and its gate

JUDGE = ROOT / ".github" / "actions" / "judge"
# what one run of the gate takes here
FEW = {"OPTIONS": "--cases tiny --tier default", "PYTEST_ADDOPTS": "-k 'test_case or test_claim or mode'"}


def test_the_skeleton_is_judged_and_a_new_fault_breaks_its_gate(python: Path, tmp_path: Path) -> None:
    made = started(python, tmp_path, "ktverify", "init-engine", "mine")
    assert made.returncode == 0, made.stderr
    mine = tmp_path / "mine"
    again = started(python, tmp_path, "ktverify", "init-engine", "mine")
    assert again.returncode == 2
    assert "mine has my_engine.py, ktverify.toml, known_failures.toml, KTVERIFY.md" in again.stderr

    how = {"ENGINE": "my_engine:Engine", "KNOWN": "known_failures.toml", "WORKERS": "1", **FEW}
    judged = started(python, mine, "bash", str(JUDGE / "judge.sh"), **how)
    # the skeleton accepts any mode, and its known failures say so
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "refused[mode" in judged.stdout
    reports = mine / "reports"
    assert json.loads((reports / "badge.json").read_text())["message"] == "passing"
    assert "passed=true" in (reports / "output.txt").read_text()
    assert "ktverify: my_engine:Engine" in (reports / "summary.md").read_text()
    claims = [record for record in load(latest(reports)).checks if record.name.startswith("test_claim[")]
    assert {record.name: record.verdict for record in claims if record.verdict == "PASS"} == {
        f"test_claim[{name}]": "PASS" for name in ("tp-1", "methods-AMXBF16_SFT", "odd_sizes", "max_cache_depth-1")
    }
    assert {record.verdict for record in claims} == {"PASS", "UNSUPPORTED"}

    engine = mine / "my_engine.py"
    engine.write_text(engine.read_text().replace("lora_alpha / lora_rank", "2 * lora_alpha / lora_rank"))
    judged = started(python, mine, "bash", str(JUDGE / "judge.sh"), **how)
    assert judged.returncode == 1, judged.stdout + judged.stderr
    assert "forward/- tiny@seed=0: FAIL output rel_l2" in (reports / "gate.txt").read_text()
    assert json.loads((reports / "badge.json").read_text())["message"] == "failing"
    assert "passed=false" in (reports / "output.txt").read_text().splitlines()[-2]


def latest(reports: Path) -> Path:
    """The newest run."""
    return max((reports / "runs").iterdir(), key=lambda path: path.stat().st_mtime)


def test_the_action_and_the_workflow_fit_each_other() -> None:
    action = yaml.safe_load((JUDGE / "action.yml").read_text())
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "ktverify.yml").read_text())
    (step,) = [step for step in workflow["jobs"]["judge"]["steps"] if "ktverify" in step.get("uses", "")]
    assert step["uses"].partition("@")[0].endswith(str(JUDGE.relative_to(ROOT)))
    assert step["with"].keys() <= action["inputs"].keys()
    required = {name for name, value in action["inputs"].items() if value.get("required")}
    assert required <= step["with"].keys()
    steps = action["runs"]["steps"]
    assert all("shell" in each for each in steps if "run" in each)
    (judging,) = [each for each in steps if each.get("id") == "judge"]
    script = (JUDGE / "judge.sh").read_text()
    assert os.access(JUDGE / "judge.sh", os.X_OK)
    assert all(f"{name}=" in script or f"${{{name}:" in script for name in judging["env"])
    assert all(f"printf '{name}=" in script for name in action["outputs"])
