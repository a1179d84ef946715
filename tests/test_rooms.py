"""Which module may import which: the arrows of the house point one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ktverify"
NATIVE = ROOT / "native"

# what judges an engine must share nothing with one
JUDGES = ("reference", "data", "metrics", "gates", "cases", "names", "golden")
ENGINE = (
    "ktverify.experts",
    "ktverify._native",
    "ktverify.engines",
    "ktverify.engines.run",
    "ktverify.engines.argument_checks",
)
# what a shell completion or `--help` imports
LIGHT = ("", "names", "cases", "files")


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


def reaches(found: set[str], module: str) -> bool:
    """True if one of the dotted names is `module` or lies in it."""
    return any(name == module or name.startswith(module + ".") for name in found)


def sources(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py"))


def name_of(path: Path) -> str:
    """ktverify.report.store for ktverify/runs/store.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imported(path.read_text(encoding="utf-8"), package)


def test_nothing_imports_the_suites() -> None:
    # a string in a command line is no import
    guilty = [name_of(path) for path in sources(PACKAGE) if reaches(imports_of(path), "suites")]
    assert not guilty


@pytest.mark.parametrize("judge", JUDGES)
def test_judges_know_no_engine(judge: str) -> None:
    files = sources(PACKAGE / judge) if (PACKAGE / judge).is_dir() else [PACKAGE / f"{judge}.py"]
    assert files
    for path in files:
        reached = [engine for engine in ENGINE if reaches(imports_of(path), engine)]
        assert not reached, f"{name_of(path)} imports {reached}"


def test_oracle_stands_alone() -> None:
    ours = {name for name in imports_of(PACKAGE / "reference.py") if name.startswith("ktverify")}
    assert {name for name in ours if not (name + ".").startswith("ktverify.spec.names.")} == set()


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    path = PACKAGE / (f"{module}.py" if module else "__init__.py")
    top_level = ast.parse(path.read_text(encoding="utf-8")).body
    statements = [ast.unparse(node) for node in top_level if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not reaches(imported("\n".join(statements), "ktverify"), "torch")


def test_only_the_command_line_imports_the_command_line() -> None:
    allowed = {"ktverify.__main__", "ktverify.cli.main"}
    guilty = [name_of(path) for path in sources(PACKAGE) if reaches(imports_of(path), "ktverify.cli.main")]
    assert set(guilty) <= allowed


def native_sources() -> list[Path]:
    found = [path for kind in ("*.cpp", "*.hpp", "*.h", "*.inl") for path in NATIVE.rglob(kind)]
    assert found
    return sorted(found)


def test_only_bind_knows_python() -> None:
    pattern = re.compile(r'#\s*include\s*[<"](pybind11|Python\.h|torch)')
    guilty = [
        str(path.relative_to(NATIVE))
        for path in native_sources()
        if path.parent.name != "bind" and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert not guilty


def test_intrinsics_stand_in_kernels_only() -> None:
    pattern = re.compile(r"#\s*include\s*<\w*intrin\.h>")
    allowed = ("kernels", "emulation", "tests")
    guilty = [
        str(path.relative_to(NATIVE))
        for path in native_sources()
        if not set(path.relative_to(NATIVE).parts) & set(allowed) and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert not guilty


def test_builds_for_no_particular_machine() -> None:
    # comments may explain why not
    text = re.sub(r"#.*", "", (NATIVE / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert "-march=native" not in text
    assert "-ffast-math" not in text


@pytest.mark.parametrize(
    ("source", "package", "module"),
    [
        ("import ktverify.experts", "ktverify", "ktverify.experts"),
        ("import ktverify.experts as e", "ktverify", "ktverify.experts"),
        ("from ktverify import experts", "ktverify", "ktverify.experts"),
        ("from ktverify.experts import KTMoEWrapper", "ktverify", "ktverify.experts"),
        ("from . import experts", "ktverify", "ktverify.experts"),
        ("from .experts import KTMoEWrapper", "ktverify", "ktverify.experts"),
        ("from ..experts import KTMoEWrapper", "ktverify.golden", "ktverify.experts"),
        ("def f():\n    import suites.support", "ktverify", "suites"),
    ],
)
def test_every_way_to_import_is_seen(source: str, package: str, module: str) -> None:
    assert reaches(imported(source, package), module)


def test_other_names_are_no_import() -> None:
    assert not reaches(imported("import ktverify.expertise", "ktverify"), "ktverify.experts")
