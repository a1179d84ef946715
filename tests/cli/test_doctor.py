"""`doctor`: a line for each part of the machine and of the installation."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from ktverify.cli import doctor
from ktverify.cli.main import app
from tests.support.command_line import call, ends, every_command
from tests.support.records import MACHINE


def test_doctor_reports_on_every_part() -> None:
    result = call("doctor")
    assert "Traceback" not in result.output
    lines = result.output.splitlines()
    assert all(re.match(r"(ok|no|note)\s", line) for line in lines)
    names = "CPU,amx_bf16,avx2,scalar,compiler,packages,native engine,training,peers of bench,memory,deepseek_v3_t4"
    for name in names.split(","):
        assert any(line[6:].startswith(name) for line in lines), name
    # states and names are aligned in columns
    assert len({line.index(line.split()[1]) for line in lines if line[6] != " "}) == 1


def lines_of(**changes: object) -> dict[str, doctor.Fact]:
    machine = type(MACHINE)(**{**vars(MACHINE), **changes})
    return {line.name: line for line in doctor.examine(machine)}


@pytest.mark.parametrize(
    ("changes", "name", "state", "text"),
    [
        ({"memory_available_bytes": 4 << 30}, "deepseek_v3_t4", "no", ""),
        ({"memory_available_bytes": 20 << 30}, "memory", "ok", ""),
        ({"memory_available_bytes": 1 << 30}, "memory", "no", ""),
        ({"versions": {}}, "compiler", "no", ""),
        ({"versions": {"compiler": "g++ (Debian 10.2.1-6) 10.2.1"}}, "compiler", "no", ""),
        ({"versions": {"compiler": "g++ (Debian 12.2.0-14+deb12u1) 12.2.0"}}, "compiler", "ok", ""),
        ({"huge_pages": "never"}, "huge pages", "note", ""),
        ({"threads": 1}, "threads", "note", ""),
        ({"isas": ("scalar",), "flags": ()}, "avx2", "no", "this CPU lacks avx2, fma"),
        ({}, "amx_bf16", "no", "this CPU has no AMX"),
        ({"amx": replace(MACHINE.amx, cpu=True)}, "amx_bf16", "no", "the kernel does not offer the tile state"),
    ],
)
def test_doctor_finds_what_is_missing(changes: dict[str, Any], name: str, state: str, text: str) -> None:
    facts = {fact.name: fact for fact in doctor.examine(replace(MACHINE, **changes))}
    assert facts[name].state == state
    assert text in facts[name].text


def test_no_help_is_cut_or_names_an_option_twice() -> None:
    looked_at = 0
    for name, command in every_command():
        for option in command.params:
            assert len({text.replace("_", "-") for text in option.opts}) == len(option.opts), name
        lines = ends(CliRunner().invoke(app, [*name, "--help"], terminal_width=110), 0).splitlines()
        assert max(map(len, lines)) <= 110, name
        assert not [line for line in lines if re.search(r"\w\.\.\.$|\[\[", line) and not line.startswith("Usage")], name
        looked_at += 1
    assert looked_at > 30


def test_help_in_a_narrow_terminal_stays_readable() -> None:
    text = ends(CliRunner().invoke(app, ["gate", "--help"], env={"COLUMNS": "80"}), 0)
    assert max(map(len, text.splitlines())) <= 80
