"""Exceptions of libraries: every command reports those that a user can cause in one line, and hides no defect."""

from __future__ import annotations

import json
import pickle
import subprocess
from typing import Any
from unittest import mock

import huggingface_hub.errors
import jinja2
import pytest
import safetensors
import typer.main
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner, Result

from ktverify.cli.main import app
from ktverify.cli.options import TRACEBACK
from ktverify.errors import EngineDied, is_expected
from tests.support.command_line import every_command, refused

COMMANDS = [" ".join(name) for name, command in every_command() if not hasattr(command, "commands")]
RAISED: list[tuple[Exception, str]] = [
    (jinja2.TemplateError("System role not supported"), "TemplateError: System role not supported"),
    (safetensors.SafetensorError("Error while serializing: No space left"), "SafetensorError: Error while serializing"),
    (OSError(28, "No space left on device", "out/a"), "out/a: No space left on device"),
    (KeyError("weight_map"), "KeyError: weight_map"),
    (KeyError("backward gave no grad_input"), "backward gave no grad_input"),
    (json.JSONDecodeError("Expecting value", "", 0), "JSONDecodeError: Expecting value"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UnicodeDecodeError: .*invalid start byte"),
    (yaml.YAMLError("a\nb"), "YAMLError: a b"),
    (huggingface_hub.errors.HFValidationError("Repo id"), "HFValidationError: Repo id"),
    (Exception("expected value at line 1"), "Exception: expected value at line 1"),
    (MemoryError(), "MemoryError"),
    (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth"),
    (ChildFailedError("train", {0: ProcessFailure(0, 0, 1, "nowhere")}), "ChildFailedError: .*train FAILED"),
    (pickle.UnpicklingError("invalid load key"), "UnpicklingError: invalid load key"),
    (subprocess.CalledProcessError(1, ["g++"]), "CalledProcessError: Command"),
    (EngineDied("CRASH forward_sft"), "CRASH forward_sft"),
    (ModuleNotFoundError("No module named 'yaml'", name="yaml"), r"report needs yaml: pip install .*\[training\]"),
    (ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"), r"report needs peft: pip install "),
    (ModuleNotFoundError("No module named 'mine'", name="mine"), "ModuleNotFoundError: No module named 'mine'"),
]


def raising(error: Exception, command: str) -> Result:
    """A call of `command` without arguments, whose function raises `error`."""
    program: Any = typer.main.get_command(app)
    leaf = program
    for name in command.split():
        leaf = leaf.commands[name]
    leaf.params, leaf.callback = [], mock.Mock(side_effect=error)
    with mock.patch("typer.testing._get_command", return_value=program):
        return CliRunner().invoke(app, command.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_one_door(command: str) -> None:
    refused(raising(RAISED[0][0], command), f"^error: {RAISED[0][1]}$")


@pytest.mark.parametrize(("error", "wanted"), RAISED, ids=lambda value: type(value).__name__)
def test_exceptions_that_a_user_can_cause(error: Exception, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(raising(error, "report"), f"^error: {wanted}")
    monkeypatch.setenv(TRACEBACK, "1")
    assert raising(error, "report").exception is error


@pytest.mark.parametrize("error", [AttributeError("x"), AssertionError("x"), ZeroDivisionError("x"), IndexError("x")])
def test_any_other_exception_is_a_defect_and_not_hidden(error: Exception) -> None:
    assert raising(error, "report").exception is error


def test_an_exception_of_any_kind_from_a_librarys_own_code_is_expected() -> None:
    with pytest.raises(AttributeError) as raised:
        yaml.safe_load(3)  # type: ignore[arg-type]
    assert is_expected(raised.value)
