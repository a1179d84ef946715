"""docs/from-kt-kernel.md names only tests that exist, and every test of this folder's two documents."""

from __future__ import annotations

import re

from ktverify.system.files import ROOT

FILES = (
    "documents/test_wrapper.py",
    "documents/test_layers.py",
    "llamafactory/test_keys.py",
    "llamafactory/test_stock.py",
)


def test_the_table_names_the_tests() -> None:
    text = (ROOT / "docs" / "from-kt-kernel.md").read_text(encoding="utf-8")
    table = text[text.index("## Every block") :]
    named = set(re.findall(r"\btest_\w+(?!\.py)\b", table)) - {"test_wrapper", "test_layers", "test_keys", "test_stock"}
    named -= {"test_parity"}
    there: dict[str, set[str]] = {}
    for file in FILES:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        there[file] = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    assert named <= set().union(*there.values())
    of_sections = {name for file in FILES[:2] for name in there[file] if re.match(r"test_\d", name)}
    assert of_sections <= named
