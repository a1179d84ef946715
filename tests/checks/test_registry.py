"""The registry of checks: complete, each held to a sentence of the contract, each run by a test file of suites/."""

from __future__ import annotations

import pickle
import re

import pytest

from ktverify.checks import registry
from ktverify.checks.check import ENTERED, Check, Where, check, enter
from ktverify.checks.target import Target
from ktverify.judge.gates import GATES
from ktverify.mutants import MUTANTS
from ktverify.system.files import ROOT

CHECKS = registry.checks()


def plain(text: str) -> str:
    """A text without Markdown and line breaks."""
    return " ".join(text.replace("`", "").replace("**", "").split())


CONTRACT = plain((ROOT / "docs" / "contract.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("one", CHECKS, ids=lambda one: one.id)
def test_a_check_is_whole(one: Check) -> None:
    assert plain(one.contract) in CONTRACT
    assert set(one.gates) <= set(GATES)
    assert one.name
    assert (ROOT / "suites" / one.family).is_dir()
    # it travels into the process that runs it
    assert pickle.loads(pickle.dumps(one)) == one
    # a check that looks inside the native engine cannot be asked of another
    assert one.native or not one.internal


def test_every_kind_is_run_by_one_file_of_its_family() -> None:
    ran: dict[str, str] = {}
    for path in (ROOT / "suites").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        kinds = [kind for call in re.findall(r"@each\(([^)]*)\)", text) for kind in re.findall(r'"(\w+)"', call)]
        kinds += [path.parent.name] if "ask.accuracy(" in text else []
        for kind in kinds:
            assert kind not in ran
            ran[kind] = path.parent.name
    assert ran == {one.kind: one.family for one in CHECKS}
    assert set(ran) == set(registry.KINDS)


def test_every_mutant_names_a_check_that_any_engine_can_be_asked() -> None:
    asked = {one.id for one in registry.of_any_engine()}
    assert {mutant.check for mutant in MUTANTS.values()} <= asked


def test_no_two_checks_have_one_id() -> None:
    with pytest.raises(ValueError, match=r"two checks have the id 'behaviour/repeats'"):
        enter([ENTERED["behaviour/repeats"]])


def test_a_new_check_is_one_function() -> None:
    @check("behaviour", "Inputs, parameters and earlier results are never written to.", where=Where.OWN_CHOICE)
    def check_anything(target: Target) -> str:
        return target.engine

    try:
        found = registry.find("behaviour/anything")
        assert found in registry.checks("behaviour")
        assert found in registry.of_any_engine()
        assert found(Target("torch_bf16")) == "torch_bf16"
    finally:
        del ENTERED["behaviour/anything"]


@pytest.mark.parametrize("wrong", ["behaviour/no_such_check", "no_such_kind/x"])
def test_what_there_is_not_is_an_error(wrong: str) -> None:
    with pytest.raises(KeyError, match="there is no check"):
        registry.find(wrong)
    with pytest.raises(KeyError, match="no check is of the kind"):
        registry.checks("no_such_kind")


def test_the_readme_has_the_right_counts() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    counted = re.search(r"(\d+) of (\d+) killed, by (\d+) checks", text)
    assert counted is not None
    assert [int(number) for number in counted.groups()] == [len(MUTANTS), len(MUTANTS), len(registry.of_any_engine())]
    assert f"one of {len(MUTANTS)} engines that are wrong on purpose" in text
