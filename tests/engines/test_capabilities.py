"""What an engine declares: attributes, ktverify.toml, what is refused in them, and what a disclaimer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktverify.checks import claims
from ktverify.checks.target import Target
from ktverify.engines import capabilities, registry
from ktverify.engines.capabilities import CONTRACT, Capabilities, Capability, declared
from ktverify.errors import GateFailed, Unsupported
from ktverify.system.files import ROOT

ARGUMENTS = {"hidden_size": 64, "moe_intermediate_size": 128, "method": "AMXBF16_SFT", "threadpool_count": 1}
CAUTIOUS = Capabilities(
    tp=(1, 2),
    methods=("AMXBF16_SFT",),
    skip_lora=False,
    odd_sizes=False,
    max_cache_depth=2,
    lora_dropout=False,
    gpu_experts=False,
)


@pytest.mark.parametrize(
    ("arguments", "disclaimed"),
    [
        ({}, ""),
        ({"threadpool_count": 2}, ""),
        ({"threadpool_count": 4}, "tp 4"),
        ({"method": "MXFP4_SFT"}, "methods MXFP4_SFT"),
        ({"method": "AMXBF16_SFT_SkipLoRA"}, "skip_lora"),
        ({"hidden_size": 97}, "odd_sizes"),
        # a part of 16 columns
        ({"moe_intermediate_size": 32, "threadpool_count": 2}, "odd_sizes"),
        ({"max_cache_depth": 2}, ""),
        ({"max_cache_depth": 3}, "max_cache_depth 3"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
        ({"gpu_experts_mask": [True, False]}, "gpu_experts"),
        # these the engine has to refuse
        ({"threadpool_count": 0}, ""),
        ({"method": "no such"}, ""),
        ({"hidden_size": -1}, ""),
        ({"max_cache_depth": 0}, ""),
        ({"lora_dropout": 1.0}, ""),
    ],
)
def test_what_is_disclaimed(arguments: dict[str, Any], disclaimed: str) -> None:
    expected = f"{disclaimed} is disclaimed" if disclaimed else ""
    assert CAUTIOUS.disclaimed({**ARGUMENTS, **arguments}) == expected
    assert Capabilities().disclaimed({**ARGUMENTS, **arguments}) == ""


def test_every_claim_is_listed_once() -> None:
    found = [(str(claim), claim.claimed) for claim in CAUTIOUS.all_claims()]
    assert len(found) == len(set(found))
    assert {("tp 2", True), ("tp 4", False), ("max_cache_depth 2", True), ("max_cache_depth 3", False)} <= set(found)
    assert Capabilities().all_claims() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contract = '9.0'", f"written for contract 9.0, this ktverify judges by {CONTRACT}"),
        ("contract = 1", "contract is 1, it takes two numbers"),
        ("tp = [1]", r"has 'tp'; it takes contract and the table \[capabilities\]"),
        ("[capabilities]\nsizes = true", "there is no capability 'sizes'; there are isas, "),
        ("[capabilities]\ntp = [0]", r"tp is \[0\], it takes a list of degrees"),
        ("[capabilities]\nodd_sizes = 1", "odd_sizes is 1, it takes true or false"),
        ("[capabilities]\nmethods = ['BF16']", "it takes a list of some of AMXBF16_SFT"),
        ("[capabilities]\nisas = ['sse9']", "it takes a list of some of amx_bf16"),
        ("[capabilities]\nfp32_sums = false", "fp32_sums is False, the factory's attribute says True"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / capabilities.FILE).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        declared("mine", {"fp32_sums": True}, tmp_path)
    assert len(str(raised.value).splitlines()) == 1
    assert str(tmp_path / capabilities.FILE) in str(raised.value)


def test_file_and_attributes_are_one_declaration(tmp_path: Path) -> None:
    (tmp_path / capabilities.FILE).write_text(f"contract = '{CONTRACT}'\n[capabilities]\ntp = [1]\nisas = ['avx2']")
    found = declared("mine", {"fp32_sums": True, "capabilities": {"tp": (1,), "odd_sizes": False}}, tmp_path)
    assert found == Capabilities(CONTRACT, ("avx2",), True, tp=(1,), odd_sizes=False)


def test_the_page_has_the_version_and_every_capability() -> None:
    page = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    assert f"\nVersion {CONTRACT}." in page
    assert f"\n| {CONTRACT} |" in page
    table = page[page.index("| capability |") : page.index("## Versions")]
    names = [row.split("|")[1].strip() for row in table.splitlines()[2:] if row]
    assert names == [name for name in Capabilities.__dataclass_fields__ if name != "contract"]


# ---- engines with true and false declarations


MODEST, BOASTFUL = Target("tests.support.unruly:Modest"), Target("tests.support.unruly:Boastful")
# its constructor takes **sizes, a mask of experts among them, and ignores it
EXAMPLE = Target(f"{ROOT}/examples/engine_outside/my_engine.py:Engine")


def test_the_example_declares_by_its_file() -> None:
    found = registry.facts(f"{ROOT}/examples/engine_outside/my_engine.py:Engine").capabilities
    assert found.contract == CONTRACT
    assert found.claims("tp", 2) is False
    assert found.claims("odd_sizes", True) is True


def test_what_is_disclaimed_is_not_called() -> None:
    with pytest.raises(NotImplementedError, match="tp 2 is disclaimed"):
        MODEST.bare(threadpool_count=2)
    MODEST.bare(threadpool_count=1)


@pytest.mark.parametrize(
    ("target", "claim", "raised", "text"),
    [
        (MODEST, Capability("tp", 2, False), Unsupported, f"^{capabilities.WORKS}tp 2$"),
        (MODEST, Capability("odd_sizes", True, False), Unsupported, f"^{capabilities.WORKS}odd_sizes$"),
        (MODEST, Capability("methods", "MXFP4_SFT", False), Unsupported, "^methods MXFP4_SFT is disclaimed$"),
        (
            MODEST,
            Capability("methods", "AMXFP8_SFT", True),
            GateFailed,
            "claims methods AMXFP8_SFT, and declares",
        ),
        (MODEST, Capability("max_cache_depth", 2, True), None, ""),
        (MODEST, Capability("tp", 1, True), None, ""),
        (BOASTFUL, Capability("odd_sizes", True, True), GateFailed, "rel_l2"),
        (BOASTFUL, Capability("tp", 2, True), None, ""),
        (BOASTFUL, Capability("skip_lora", True, True), None, ""),
        (EXAMPLE, Capability("gpu_experts", True, False), Unsupported, "^gpu_experts is disclaimed$"),
        (EXAMPLE, Capability("gpu_experts", True, True), GateFailed, "claims gpu_experts, and declares"),
        (Target("native"), Capability("gpu_experts", True, True), None, ""),
    ],
)
def test_a_claim_is_tried(target: Target, claim: Capability, raised: type[Exception] | None, text: str) -> None:
    if raised is None:
        claims.judge_claim(target, claim)
        return
    with pytest.raises(raised, match=text):
        claims.judge_claim(target, claim)
