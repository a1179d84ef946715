"""Text of an engine or its user on its way to a terminal, a page, JSON and XML."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ktverify.errors import GateFailed
from ktverify.isolation.origin import describe
from ktverify.report.failure_text import text_of
from ktverify.runs.record import CheckRecord, parse_line
from ktverify.runs.store import load
from ktverify.system.printable import MOST, MOST_OF_A_LINE, shown, shown_line
from tests.support.command_line import call, python, run_pytest
from tests.support.unruly import UNFIT

FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ä, 語, two\nlines\tand a tab", "plain, ä, 語, two\nlines\tand a tab"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("a\r\nb\rc", "a\nb\\x0dc"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\ud800 \udcff", "\\ud800 \\udcff"),
        ("\u202eabc\u2066\u2028", "\\u202eabc\\u2066\\u2028"),
    ],
)
def test_unfit_characters_are_written_as_escapes(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(shown(text)) == expected


@pytest.mark.parametrize("letter", ["x", "\x00", "\ud800", "\n"])
def test_long_texts_are_cut_and_keep_both_ends(letter: str) -> None:
    found = shown("begin " + letter * 3_000_000 + " end")
    assert len(found) <= MOST
    assert (found[:6], found[-4:]) == ("begin ", " end")
    assert "more characters" in found
    assert shown(found) == found
    assert len(shown_line(f"begin {letter * 3_000_000} end")) <= MOST_OF_A_LINE


def test_every_text_of_a_record_is_fit() -> None:
    record = CheckRecord(
        family="contract", engine=UNFIT, name=UNFIT, case=UNFIT, repro=UNFIT, verdict="FAIL", message=UNFIT * 9999
    )
    line = record.model_dump_json()
    assert not FORBIDDEN.search(line)
    assert len(line) < 2 * MOST
    assert parse_line(line) == record


def test_what_a_terminal_gets_of_a_failure_is_fit() -> None:
    for text in (text_of(GateFailed(UNFIT, ()), "pytest"), describe(ValueError(UNFIT)), describe(KeyError(UNFIT))):
        assert text
        assert not FORBIDDEN.search(text)


@pytest.mark.parametrize(("engine", "verdict"), [("SaysAnything", "CRASH"), ("DeclaresAnything", "UNSUPPORTED")])
def test_an_engine_that_says_anything(engine: str, verdict: str, tmp_path: Path) -> None:
    """Terminal, report, records and JUnit's XML of a run, and the commands that take an engine."""
    run, xml = tmp_path / "run", tmp_path / "junit.xml"
    name = f"tests.support.unruly:{engine}"
    options = (f"--engine={name}", "--cases=tiny", "-k", "tiny or repeats", f"--junitxml={xml}", "-rs")
    done = run_pytest(run, "suites/forward", "suites/contract", *options)
    assert done.returncode == 1, done.stdout
    assert {record.verdict for record in load(run).records} == {verdict}
    texts = {"stdout": done.stdout, "stderr": done.stderr, "xml": xml.read_text(encoding="utf-8")}
    texts |= {path.name: path.read_text(encoding="utf-8") for path in run.iterdir() if path.suffix != ".png"}
    for command in ("repro", "diagnose --seconds 3", "verify --mode forward --case"):
        said = call(*command.split(), "tiny", "--engine", name)
        assert "Traceback" not in said.output
        texts[command] = said.output
    for where, text in texts.items():
        assert text or where == "stderr"
        assert not FORBIDDEN.search(text), (where, FORBIDDEN.search(text))
        assert len(text) < 500_000, where
    ElementTree.fromstring(texts["xml"])
    for line in texts["records.jsonl"].splitlines():
        json.loads(line)
    assert "<b>in the end" not in texts["report.html"]


def test_names_of_files_with_any_bytes_are_told_in_one_line(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/no\xff\x1b[31msuch")
    for arguments in (["report", odd], ["repro", odd], ["repro", "tiny", "--engine", f"{odd}.py:x"], ["gate", odd]):
        done = python("-m", "ktverify", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
        assert not FORBIDDEN.search(done.stderr)
