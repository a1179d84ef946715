"""The plan of the house: which room may import which, how long a file may be, one class for each name."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import ktverify
from ktverify.checks.target import Target
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.registry import find
from ktverify.isolation.hosted import Hosted
from ktverify.spec.cases import Case
from ktverify.system.files import ROOT
from tests.support.command_line import loaded_modules

PACKAGE = ROOT / "ktverify"
NATIVE = ROOT / "native"

# bottom to top: a room imports only rooms before it
ROOMS = (
    "errors",
    "system",
    "spec",
    "judge",
    "runs",
    "isolation",
    "engines",
    "experts",
    "checks",
    "diagnose",
    "reproducer",
    "mutants",
    "report",
    "training",
    "llamafactory",
    "as_kt_kernel",
    "bench",
    "cli",
    "pytest_plugin",
    "golden",
    "__main__",
)
# the modules that lie in the package's root beside __init__ and __main__
LOOSE = {"errors", "experts", "as_kt_kernel"}
# longest file of the package
MOST_LINES = 400


def imported(source: str, package: str) -> set[str]:
    """Dotted names of all modules that `source` imports, anywhere in it; relative ones resolved against `package`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found.add(base)
            # `from ktverify import experts` imports a module as much as `import ktverify.experts` does
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def name_of(path: Path) -> str:
    """ktverify.runs.store for ktverify/runs/store.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, also inside its functions; suites and tests as well."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = imported(path.read_text(encoding="utf-8"), package)
    # a module counts, not the names in it; its package is imported with it and counts only where it is named itself
    return {each for each in found if each in MODULES or each.partition(".")[0] in ("suites", "tests")} - {name}


def room_of(name: str) -> str:
    """`runs` for ktverify.runs.store, "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


IMPORTS = {name: imports_of(name) for name in MODULES}


def test_every_room_is_named() -> None:
    assert {room_of(name) for name in MODULES} - {""} == set(ROOMS)
    loose = {path.stem for path in MODULES.values() if path.parent == PACKAGE}
    assert loose == LOOSE | {"__init__", "__main__"}


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    if name == "ktverify":
        # its public names are lazy: using one imports its room
        return
    own = ROOMS.index(room_of(name))
    higher = [each for each in IMPORTS[name] if room_of(each) and ROOMS.index(room_of(each)) > own]
    assert not higher
    assert not [each for each in IMPORTS[name] if each.partition(".")[0] in ("suites", "tests")]


def test_there_is_no_circle() -> None:
    left = {name: {each for each in found if each in MODULES and each != "ktverify"} for name, found in IMPORTS.items()}
    left.pop("ktverify")
    while free := [name for name, found in left.items() if not found & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these modules import each other: {sorted(left)}"


def test_the_oracle_stands_alone() -> None:
    assert IMPORTS["ktverify.judge.reference"] <= {"ktverify.spec.names"}


def test_light_modules_load_no_torch() -> None:
    light = "import ktverify, ktverify.spec.names, ktverify.system.files"
    loaded = loaded_modules(f"{light}; from ktverify.spec.cases import catalogue; catalogue()")
    assert "ktverify" in loaded
    assert not {"torch", "numpy", "typer"} & set(loaded)


def test_public_names_are_those_of_their_modules() -> None:
    named = {"Case": Case, "Target": Target, "Hosted": Hosted, "KTMoEWrapper": KTMoEWrapper, "find_engine": find}
    assert {name: getattr(ktverify, name) for name in named} == named
    assert set(named) <= set(ktverify.__all__) <= set(dir(ktverify))
    with pytest.raises(AttributeError, match="module 'ktverify' has no attribute 'nothing'"):
        _ = ktverify.nothing


def test_no_file_is_too_long() -> None:
    paths = [*MODULES.values(), *native_sources()]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in paths
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES and "tests" not in path.parts
    }
    assert not long


def test_no_two_classes_have_one_name() -> None:
    names = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


# ---- native


def native_sources() -> list[Path]:
    found = [path for kind in ("*.cpp", "*.hpp", "*.h", "*.inl") for path in NATIVE.rglob(kind)]
    assert found
    return sorted(found)


@pytest.mark.parametrize(
    ("include", "allowed"),
    [
        (r'#\s*include\s*[<"](pybind11|Python\.h|torch)', {"bind"}),
        (r"#\s*include\s*<\w*intrin\.h>", {"kernels", "emulation", "tests"}),
    ],
)
def test_native_includes(include: str, allowed: set[str]) -> None:
    guilty = [
        str(path.relative_to(NATIVE))
        for path in native_sources()
        if not set(path.relative_to(NATIVE).parts) & allowed and re.search(include, path.read_text(encoding="utf-8"))
    ]
    assert not guilty


def test_the_build_is_for_no_particular_machine() -> None:
    # comments may explain why not
    text = re.sub(r"#.*", "", (NATIVE / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert "-march=native" not in text
    assert "-ffast-math" not in text


# ---- the reader of imports itself


@pytest.mark.parametrize(
    ("source", "package", "module"),
    [
        ("import ktverify.experts", "ktverify", "ktverify.experts"),
        ("import ktverify.experts as e", "ktverify", "ktverify.experts"),
        ("from ktverify import experts", "ktverify", "ktverify.experts"),
        ("from ktverify.experts import KTMoEWrapper", "ktverify", "ktverify.experts"),
        ("from . import experts", "ktverify", "ktverify.experts"),
        ("from ..experts import KTMoEWrapper", "ktverify.golden", "ktverify.experts"),
        ("def f():\n    import suites.support", "ktverify", "suites.support"),
    ],
)
def test_every_way_to_import_is_seen(source: str, package: str, module: str) -> None:
    assert module in imported(source, package)


def test_the_map_is_complete() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## The map") : text.index("## Words")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name.removesuffix(".py") for row in rows for name in re.findall(r"`ktverify/([\w.]+?)/?`", row)]
    assert tuple(named) == ROOMS
    folders = {name for row in rows for name in re.findall(r"`(\w+)/`", row)}
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders | {"ktverify"} >= there - {"build", "saves", "tiny", "merged"}
    words = text[text.index("## Words") : text.index("## Add a case")]
    assert sum(line.startswith("| ") for line in words.splitlines()) - 2 <= 25
