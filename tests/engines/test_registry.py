"""Engines are found by name; a file in the folder of engines is all that a new one needs."""

from __future__ import annotations

from pathlib import Path

from ktverify.engines.registry import built_in, load, names
from tests.support.command_line import loaded_modules


def test_an_engine_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text('import no_such_module\n\nENGINE = "Plain"\n', encoding="utf-8")
    (tmp_path / "helper.py").write_text("THREADS = 2\n", encoding="utf-8")
    package = tmp_path / "native"
    package.mkdir()
    (package / "__init__.py").write_text('ENGINE = "layer.fast:Layer"\n', encoding="utf-8")
    assert list(built_in(tmp_path, "engines").items()) == [
        ("native", "engines.native.layer.fast:Layer"),
        ("plain", "engines.plain:Plain"),
    ]


def test_every_engine_of_the_package_loads() -> None:
    assert names() == ["native", "kt_kernel", "torch_bf16", "torch_grouped_mm"]
    assert all(callable(load(name)) for name in names())


def test_names_are_found_without_torch() -> None:
    assert "torch" not in loaded_modules("from ktverify.engines.registry import names; names()")
