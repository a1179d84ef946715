"""Engines are found by name; a file in the folder of engines is all that a new one needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ktverify.engines.registry import ARGUMENTS, built_in, facts, load, names
from ktverify.engines.run import layer_arguments
from ktverify.isolation.hosted import absolute
from ktverify.spec.cases import Case
from tests.support.command_line import call, ends, loaded_modules, refused


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
    assert names() == [
        "native",
        "kt_kernel",
        "torch_bf16",
        "torch_grouped_mm",
        "transformers_experts",
        "vllm_cpu",
    ]
    assert all(callable(load(name)) for name in names())


def test_names_are_found_without_torch() -> None:
    assert "torch" not in loaded_modules("from ktverify.engines.registry import names; names()")


LAYER = """
class {0}:
    def __init__(self, **_): ...
    def forward_sft(self): ...
    def backward(self): ...
"""
TEXTS = {
    "one": "import torch\n" + LAYER.format("Engine") + "def silu(x): ...\n",
    "function": "def silu(x): ...\ndef make(num_experts, **more): ...\n",
    "imported": "from ktverify.engines.torch_bf16 import TorchBf16\nfrom pathlib import Path\n",
    "hosted": "from ktverify import Hosted\nfactory = Hosted('/no/such.py:Engine', '/no/such/python')\n",
    "partial": "import functools\n" + LAYER.format("_Base") + "make = functools.partial(_Base, fast=True)\n",
    "private": LAYER.format("_Base") + "class Engine(_Base): ...\n",
    "alias": LAYER.format("Engine") + "Moe = Engine\n",
    "interface": "from typing import Protocol\nclass Layer(Protocol):\n    def forward_sft(self): ...\n"
    "    def backward(self): ...\n" + LAYER.format("Engine"),
    "abstract": "import abc\nclass Base(abc.ABC):\n    @abc.abstractmethod\n    def forward_sft(self): ...\n"
    "    def backward(self): ...\n" + LAYER.format("Engine(Base)"),
    "cached": "import functools\n@functools.cache\ndef make(**arguments): ...\n",
    "object": "class _Factory:\n    def __call__(self, **arguments): ...\nfactory = _Factory()\n",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass Sizes:\n    hidden: int = 1\n"
    + LAYER.format("Engine"),
    "listed": "__all__ = ['Fast']\n" + LAYER.format("Fast") + LAYER.format("Slow"),
    "two": LAYER.format("Fast") + LAYER.format("Slow"),
    "two_and_a_partial": "import functools\n" + LAYER.format("Fast") + "Slow = functools.partial(Fast, slow=1)\n",
    "none": "def silu(x): ...\nVALUE = 3\n",
}
FOUND = {
    "one": "Engine",
    "partial": "make",
    "function": "make",
    "imported": "TorchBf16",
    "hosted": "factory",
    "private": "Engine",
    "alias": "Engine",
    "interface": "Engine",
    "abstract": "Engine",
    "cached": "make",
    "object": "factory",
    "dataclass": "Engine",
    "listed": "Fast",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module for each of TEXTS, also inside a package; it is the current one and on the path."""
    for folder in (tmp_path, tmp_path / "layers_of_mine"):
        folder.mkdir(exist_ok=True)
        for name, text in TEXTS.items():
            (folder / f"of_{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def ways(name: str, folder: Path) -> tuple[str, ...]:
    return f"{folder}/of_{name}.py", absolute(f"of_{name}.py"), f"of_{name}", f"layers_of_mine.of_{name}"


@pytest.mark.parametrize("name", FOUND)
def test_a_module_with_one_factory_needs_no_name_of_it(modules: Path, name: str) -> None:
    for way in ways(name, modules):
        found = load(way)
        assert found is load(f"{way}:{FOUND[name]}")


@pytest.mark.parametrize("name", ["outside_of_this", "outside.of_this", "outside_of_this.py"])
def test_a_module_without_a_name_of_its_factory_runs_in_another_process(modules: Path, name: str) -> None:
    for path in ("outside_of_this.py", "outside/of_this.py", "outside/__init__.py"):
        (modules / path).parent.mkdir(exist_ok=True)
        (modules / path).write_text(TEXTS["one"], encoding="utf-8")
    assert facts(name).hosted is not None
    assert not {"outside_of_this", "outside", "outside.of_this"} & set(sys.modules)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *(
            (name, r"has 2 callables that could make a layer: give one of \S+:Fast, \S+:Slow$")
            for name in ("two", "two_and_a_partial")
        ),
        ("none", r"has no callable that takes an engine's arguments; it has silu: give one as \S+:factory$"),
    ],
)
def test_a_module_without_a_clear_factory_is_refused(modules: Path, name: str, says: str) -> None:
    for way in ways(name, modules):
        with pytest.raises(ValueError, match=says):
            load(way)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("engine.py", r"^there is no file 'engine\.py'; takes native, "),
        ("natve", r"^no engine is called 'natve'; did you mean native\? takes native, "),
        ("no_such_package_at_all", r"^no engine is called 'no_such_package_at_all'; takes native, "),
        ("", r"^no engine is called ''; takes native, "),
    ],
)
def test_an_unknown_name_gets_a_hint_only_where_it_is_near(modules: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import beside_it\n", r"No module named 'beside_it'; put \S+/apart into PYTHONPATH \(\S+engine\.py:1\)$"),
        ("import parts.of_it\n", r"No module named 'parts'; put \S+/apart into PYTHONPATH \("),
        ("from . import beside_it\n", r"; put \S+ into PYTHONPATH and name the module: apart\.engine \("),
        ("import no_such_module\n", r"No module named 'no_such_module' \("),
        ("from torch import no_such_name\n", r"cannot import name 'no_such_name' from 'torch' \([^)]*\) \("),
        ("1 / 0\n", r"ZeroDivisionError: division by zero \("),
    ],
)
def test_an_import_that_fails_says_what_to_do(text: str, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "apart"
    (folder / "parts").mkdir(parents=True)
    (folder / "beside_it.py").touch()
    (folder / "engine.py").write_text(text, encoding="utf-8")
    with pytest.raises(ImportError, match=says):
        load(f"{folder}/engine.py")


def test_a_factory_is_asked_for_the_arguments_that_it_gets() -> None:
    assert tuple(layer_arguments(Case.parse("small"))) == ARGUMENTS


def test_every_command_finds_the_only_factory(modules: Path) -> None:
    text = "from ktverify.engines.torch_bf16 import TorchBf16\n"
    (modules / "mine.py").write_text(text, encoding="utf-8")
    case = "E=4,k=2,H=32,I=32,T=5,r=4,alpha=8"
    for words in (
        ("repro", case),
        ("verify", "--mode", "forward", "--case", case),
        ("diagnose", case, "--seconds", "0"),
        ("debug", "gradients", case),
        ("debug", "nan", case),
    ):
        for way in ("mine.py", "mine"):
            ends(call(*words, "--engine", way), 0)
        two = call(*words, "--engine", "of_two.py")
        refused(two, r"of_two\.py has 2 callables that could make a layer: give one of \S+:Fast, \S+:Slow$")


BROKEN = """
class Engine:
    def __init__(self, **_):
        self.part()
    def part(self):
        return 1 // 0  # raises here
    def forward_sft(self): ...
    def backward(self): ...
"""


@pytest.mark.parametrize("words", [("repro", "small"), ("verify", "--case", "small"), ("verify", "--mode", "training")])
def test_an_engine_that_refuses_is_told_with_its_line(modules: Path, words: tuple[str, ...]) -> None:
    (modules / "broken.py").write_text(BROKEN, encoding="utf-8")
    done = call(*words, "--engine", "broken.py")
    refused(done, r"^error: constructor: ZeroDivisionError: integer division or modulo by zero \(broken\.py:6\)$")
