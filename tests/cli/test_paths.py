"""~ and $VARIABLE in the paths of commands and of environment variables, where no shell has replaced them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file

import ktverify
from ktverify import training
from ktverify.checks.target import SMALL, Target
from ktverify.cli.golden import app as golden_app
from ktverify.cli.main import app
from ktverify.engines import registry
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import layer_arguments
from ktverify.isolation.hosted import absolute
from ktverify.judge.golden import golden_dir
from ktverify.system import optional_peers
from ktverify.system.files import expand
from ktverify.training.capture import Capture
from tests.support.command_line import call, ends, refused


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("~/a", "{home}/a"),
        ("~", "{home}"),
        ("$PLACE/a", "{home}/place/a"),
        ("${PLACE}/a", "{home}/place/a"),
        ("~/$PLACE", "{home}/{home}/place"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("$TILDE/a", "{home}/a"),
        ("{home}/a b%s/c", "{home}/a b%s/c"),
        ("{home}/has$NOWHERE/new", "{home}/has$NOWHERE/new"),
        ("{home}/has$NOWHERE/$FOLDER/new", "{home}/has$NOWHERE/x$NOWHERE/new"),
        ("$FOLDER/new", "x$NOWHERE/new"),
        ("$1", None),
        ("${PLACE:-here}", None),
        ("$NOWHERE/has$NOWHERE", None),
        ("", ""),
        ("plain", "plain"),
    ],
)
def test_a_path_is_expanded_as_a_shell_does(
    path: str, wanted: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILDE", "~")
    monkeypatch.setenv("FOLDER", "x$NOWHERE")
    (home / "has$NOWHERE").mkdir()
    given = path.replace("{home}", str(home))
    if wanted is None:
        with pytest.raises(ValueError, match=r"has the variable .*, which is not set"):
            expand(given)
    else:
        assert expand(given) == wanted.format(home=home)


def test_what_cannot_be_expanded_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match=r"'\$NOWHERE/a' has the variable \$NOWHERE, which is not set"):
        expand("$NOWHERE/a")
    with pytest.raises(ValueError, match="begins with ~nobody_here, and there is no such user"):
        expand("~nobody_here/a")
    (home / "a$NOWHERE").touch()
    assert expand(f"{home}/a$NOWHERE") == f"{home}/a$NOWHERE"


def _commands(group: typer.Typer) -> Iterator[Any]:
    yield from (info.callback for info in group.registered_commands)
    for info in group.registered_groups:
        assert info.typer_instance is not None
        yield from _commands(info.typer_instance)


def test_the_paths_of_every_command_are_expanded() -> None:
    commands = [*_commands(app), *_commands(golden_app)]
    assert len(commands) > 20
    assert all(hasattr(command, "__wrapped__") for command in commands)


@pytest.mark.parametrize("written", ["~/place", "$PLACE", "${HOME}/place"])
def test_commands_and_variables_find_the_place(written: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = home / "place"
    ends(call("make-tiny", "mixtral", f"--out={written}/tiny"), 0)
    assert (place / "tiny" / "config.json").is_file()
    (place / "loss.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    ends(call("compare-curves", written, f"{written}/loss.jsonl", f"--plot={written}/curves.png"), 0)
    assert (place / "curves.png").is_file()
    (place / "c.yaml").write_text(
        f"model_name_or_path: {written}/no\ndataset: alpaca_tiny\noutput_dir: {written}/out\n"
    )
    refused(call("train", f"{written}/c.yaml"), f"model_name_or_path '{place}/no' is no directory")
    refused(call("report", f"{written}/run"), f"no run at {place}/run")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    for words in (("export-merged",), ("export-adapter", "--format=kt")):
        given = (*words, f"{written}/adapter", f"--out={written}/out")
        refused(call(*given, f"--base={written}/no"), f"{place}/no")
        (place / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{written}/named"}}')
        refused(call(*given), f"{place}/named")
    peer = place / "peer.py"
    peer.write_text("TITLE = 1")
    refused(call("bench", "--list", "--peers", f"{written}/peer.py"), f"{peer} is no engine")
    assert absolute(f"{written}/engine.py:make") == f"{place}/engine.py:make"
    monkeypatch.setenv("KTVERIFY_GOLDEN_DIR", f"{written}/golden")
    assert golden_dir() == place / "golden"
    (place / "python").touch()
    for need, location in optional_peers.LOCATIONS.items():
        monkeypatch.setenv(location.variable, f"{written}/python")
        assert optional_peers.find(need, {}) == (place / "python", "")


ENGINE = """
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify import Hosted

class Engine(KTMoEWrapper):
    stand_alone = "~/place/run.py"

elsewhere = Hosted("$PLACE/engine.py:Engine", stand_alone="$PLACE/run.py")
"""


def _error(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, ImportError)) as raised:
        call()
    return str(raised.value)


# what takes a path in Python: of a place as it is written -> a text with the place that it means
DOORS: dict[str, Callable[[str], object]] = {
    "find_engine": lambda place: inspect.getfile(ktverify.find_engine(f"{place}/engine.py:Engine")),
    "find_engine, no file": lambda place: _error(lambda: ktverify.find_engine(f"{place}/no.py:Engine")),
    "Target": lambda place: type(Target(f"{place}/engine.py:Engine").bare()).__name__ + f" {os.environ['PLACE']}",
    "facts": lambda place: registry.facts(f"{place}/engine.py:Engine").stand_alone,
    "facts of a hosted engine": lambda place: registry.facts(f"{place}/engine.py:elsewhere").stand_alone,
    "Hosted": lambda place: ktverify.Hosted(f"{place}/engine.py:Engine").facts()["file"],
    "Hosted, python": lambda place: ktverify.Hosted("a:b", f"{place}/python").check(),
    "Hosted, no python": lambda place: _error(ktverify.Hosted("a:b", f"{place}/no").check),
    "Hosted, stand_alone": lambda place: ktverify.Hosted("a:b", stand_alone=f"{place}/run.py").stand_alone,
    "load_model": lambda place: _error(lambda: training.load_model(f"{place}/no", "bfloat16")),
    "load_model, Path": lambda place: _error(lambda: training.load_model(Path(f"{place}/no"), "bfloat16")),
    "load_adapter": lambda place: _error(lambda: training.load_adapter(torch.nn.Linear(1, 1), f"{place}/no")),
    "weight_path": lambda place: _error(
        KTMoEWrapper(**layer_arguments(SMALL, weight_path=f"{place}/model.safetensors")).load_weights
    ).replace("holds no routed experts", os.environ["PLACE"]),
    "init_cpu_infer": lambda place: (
        training.init_cpu_infer(weight_path=f"{place}/model.safetensors") and os.environ["PLACE"]
    ),
    "capturing": lambda place: Capture(f"{place}/captured").directory,
}


@pytest.mark.parametrize("written", ["~/place", "$PLACE", "${HOME}/place"])
@pytest.mark.parametrize("door", DOORS)
def test_paths_that_python_code_gives_are_expanded(door: str, written: str, home: Path) -> None:
    place = home / "place"
    place.mkdir()
    (place / "engine.py").write_text(ENGINE)
    (place / "python").touch()
    save_file({"a": torch.zeros(1)}, place / "model.safetensors")
    assert str(place) in str(DOORS[door](written))


@pytest.mark.parametrize(
    ("path", "text"),
    [("~nobody_here", "there is no such user"), ("$NOWHERE", "which is not set"), ("a\0b", "has a NUL character")],
)
@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_means_no_place_is_refused_at_every_door(door: str, path: str, text: str) -> None:
    try:
        found = str(DOORS[door](path))
    except ValueError as error:
        found = str(error)
    assert text in found


@pytest.mark.parametrize(
    "given", [{"spec": 7}, {"spec": None}, {"spec": "a:b", "python": 7}, {"spec": "a:b", "stand_alone": 7}]
)
def test_a_hosted_engine_takes_text(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"spec is a \w+; it takes text|not int"):
        ktverify.Hosted(**given)
