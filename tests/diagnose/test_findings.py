"""Engines with known defects: which finding of `diagnose` and `debug` comes first, and which are listed besides it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ktverify.checks.registry import find
from ktverify.checks.target import Target
from ktverify.diagnose import diagnose as diagnosing
from ktverify.diagnose.asking import Asking
from ktverify.diagnose.diagnose import diagnose
from ktverify.diagnose.evidence import Evidence
from ktverify.diagnose.search import Diagnosis, explain, proved
from ktverify.diagnose.stale import stale_values
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import LORA_NAMES
from tests.support import sick
from tests.support.command_line import call, ends

pytestmark = pytest.mark.slow
CASE = Case.parse("E=5,k=2,H=72,I=40,T=20,r=8,alpha=16")
SICK = f"{sick.__name__}:"
UPDATED = "stale after update_lora_weights: "
LOADED = "stale after a second load_weights_from_tensors: "

HANGS_S = 8  # after which a call of an engine that hangs is ended

# engine -> what the first finding says, what is listed besides it
NO_ANSWER = {
    "SegfaultInForward": ("the engine died in forward_sft: SIGSEGV", ["about to read", "sick.py"]),
    "ExitsInForward": ("the engine died in forward_sft: exit code 3", []),
    "HangInBackward": (f"the engine hangs in backward: no answer after {HANGS_S} s", ["going to sleep", "in _wait"]),
    "EatsInBackward": ("the engine takes too much memory in backward: ", ["the limit is 1.5 GiB"]),
    "LeavesInBackward": ("the engine raises in backward: SystemExit: 3 (sick.py:", []),
    "RaisesInConstructor": ("the engine raises in constructor: ZeroDivisionError: ", ["(sick.py:"]),
    "SegfaultInConstructor": ("the engine died in constructor: SIGSEGV", ["sick.py"]),
    "PrintsAndDies": ("the engine died in backward: SIGSEGV", ["the last that it said", "sick.py"]),
    "InterruptsItself": ("the engine raises in backward: KeyboardInterrupt (sick.py:", []),
    "OtherNames": ("the engine raises in backward: KeyError: backward gave no grad_gate_lora_a, ", []),
    "ReturnsAnArray": ("the engine raises in forward_sft: TypeError: the result is a ndarray, it must be a tensor", []),
    "RaisesDeepInside": ("the engine raises in backward: IndexError: list index out of range (sick.py:", []),
}
DECLARED = {
    "NoBackward": (0, "UNSUPPORTED no backward yet"),
    "NoLayer": (1, "UNSUPPORTED not on this machine"),
}
STALE = {
    **{f"Stale_{name}": [f"{name} is {UPDATED}"] for name in LORA_NAMES},
    "UpdateDoesNothing": [f"all six LoRA tensors are {UPDATED}"],
    "PackedOnce": [f"gate_lora_b is {UPDATED}"],
    "StaleFp32": ["gate_lora_b is stale after update_lora_weights of fp32 LoRA: "],
    "StaleInBackward": ["gate_lora_b is stale in the backward after update_lora_weights: "],
    "StaleBase": [f"the base weights, all three, are {LOADED}"],
    "StaleDown": [f"down_proj is {LOADED}"],
    "OfTheFirstLayer": ["a second layer computes with down_proj of an earlier one"],
    "Stale_gate_lora_b_and_StaleDown": [f"gate_lora_b is {UPDATED}", f"down_proj is {LOADED}"],
}
SCALED_B = r"LoRA scaling in the gradients of B: found 1\.0"
SIGMA = r"silu' is sigmoid\(g\), expected"
NO_GRADIENT = r"grad_weights is (missing|zero)"
SMALL = Case.parse("small")
# engine -> a pattern for each of its defects; the first one of a pair is the one that the whole does not show
SEVERAL = {
    "lora_b_gradient_unscaled_and_routing_gradient_zero": [SCALED_B, NO_GRADIENT],
    "slope_is_sigma_and_routing_gradient_weighted": [SIGMA, r"grad_weights has the weight in it"],
    "no_lora_on_down_and_slope_is_sigma": [r"down's LoRA part is missing", SIGMA],
    "experts_0_and_1_exchanged_and_routing_gradient_zero": [r"experts are permuted: 0 has 1's, 1 has 0's", NO_GRADIENT],
    "gate_up_lora_a_exchanged_and_slope_is_sigma": [r"gate_lora_a and up_lora_a are exchanged", SIGMA],
}


def diagnosed(engine: str, **more: Any) -> Diagnosis:
    with Asking() as asking:
        return diagnose(CASE, Target(SICK + engine), asking=asking, **more)


def lines(engine: str, command: tuple[str, ...], code: int) -> str:
    # a busy machine may take seconds for a call that ends
    seconds = HANGS_S if engine == "HangInBackward" else 120
    limits = ["--time-limit", str(seconds)]
    limits += ["--memory-limit", "1.5"] if command[0] != "repro" else []
    done = call(*command, CASE.id, "--engine", SICK + engine, *limits)
    ends(done, code)
    # stderr has lines on the progress
    return done.stdout


@pytest.mark.parametrize("engine", NO_ANSWER)
def test_an_engine_that_gives_no_answer_is_a_finding(engine: str) -> None:
    first, besides = NO_ANSWER[engine]
    text = lines(engine, ("diagnose", "--seconds", "2"), 1)
    assert text.startswith(f"cause: {first}"), text
    assert all(each in text for each in besides), text
    assert "kind of cause: crash" in text
    assert f"certain: this call of {CASE.id} shows it" in text
    # one finding, however many checks meet it
    assert "\n2. " not in text, text


@pytest.mark.parametrize("engine", NO_ANSWER)
def test_debug_says_what_the_engine_did_instead(engine: str, tmp_path: Path) -> None:
    first, besides = NO_ANSWER[engine]
    text = lines(engine, ("debug", "gradients"), 1)
    assert text.startswith(first), text
    assert all(each in text for each in besides), text
    # what it gave before is shown
    assert ("\noutput" in text) == ("backward" in first), text
    nan = lines(engine, ("debug", "nan", "--save", str(tmp_path / "nan.safetensors")), 1)
    assert nan.startswith(first), nan
    assert "oracle: every stage is finite on these inputs" in nan


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ("ResultOnMeta", "output is torch.strided on meta, expected torch.strided on cpu"),
        ("SparseResult", "grad_input is a SparseCPUTensor"),
    ],
)
def test_a_result_that_cannot_be_compared_is_a_finding(engine: str, says: str) -> None:
    assert says in lines(engine, ("diagnose", "--seconds", "1"), 1).splitlines()[0]
    assert says in lines(engine, ("repro",), 1)


@pytest.mark.parametrize(
    ("engine", "seconds", "says", "level"),
    [
        (
            "SegfaultInUpdate",
            90,  # it does not take so long; a busy machine may need many of them
            "the engine died in update_lora_weights: SIGSEGV",
            "certain: a call after update_lora_weights shows it",
        ),
        ("HangInUpdate", 20, "the engine may hang in update_lora_weights: it had not answered for ", "possible"),
    ],
)
def test_what_no_check_had_time_for_is_a_finding(
    engine: str, seconds: int, says: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosing, "_LONG_S", 1.0)
    monkeypatch.setattr(diagnosing, "quick", lambda: [find("behaviour/repeats")])
    found = lines(engine, ("diagnose", "--seconds", str(seconds)), 1)
    assert found.startswith(f"cause: {says}"), found
    assert f"\n    {level}" in found


@pytest.mark.parametrize("engine", DECLARED)
def test_a_declared_gap_is_no_cause(engine: str) -> None:
    code, says = DECLARED[engine]
    text = lines(engine, ("diagnose", "--seconds", "2"), code)
    assert text.startswith(says), text
    assert "cause:" not in text
    assert lines(engine, ("debug", "gradients"), 1).startswith(says)
    found = json.loads(lines(engine, ("diagnose", "--seconds", "0", "--json"), code))
    assert found["findings"] == []
    assert found["unsupported"] == {says.removeprefix("UNSUPPORTED "): [CASE.id]}


@pytest.mark.parametrize("engine", STALE)
def test_a_stale_tensor_is_named_for_certain(engine: str) -> None:
    with Asking() as asking:
        found = asking.call(stale_values, Target(SICK + engine))
    assert len(found) == len(STALE[engine]), [each.text for each in found]
    for each, says in zip(found, STALE[engine], strict=True):
        assert each.text.startswith(says), each.text
        assert each.level == "certain"


def test_a_right_engine_has_nothing_stale() -> None:
    assert stale_values(Target("torch_bf16")) == []


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the checks only some that stale values fail, and one that they do not."""
    ids = ("behaviour/repeats", "behaviour/reload", "training/update", "training/fp32_parameters", "forward/small")
    monkeypatch.setattr(diagnosing, "quick", lambda: [find(each) for each in ids])


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize("engine", ["Stale_gate_lora_b", "PackedOnce", "StaleFp32"])
def test_a_stale_tensor_is_the_only_finding_of_the_checks_on_it(engine: str) -> None:
    found = diagnosed(engine, seconds=300.0)
    assert found.failing == ()
    assert [each.cause.value for each in found.explanations] == ["stale_lora"], [
        each.line for each in found.explanations
    ]
    assert "gate_lora_b" in found.line
    assert found.explanations[0].also


@pytest.mark.parametrize("engine", SEVERAL)
def test_each_of_several_defects_is_a_finding(engine: str) -> None:
    target = Target(SICK + engine)
    # with few tokens an expert the numbers allow other explanations
    case = SMALL if engine.startswith("experts") else CASE
    evidence = [
        Evidence.of(i, target.run(i.case, i), target, seconds=300.0)
        for i in map(make_inputs, (case, case.with_seed(1)))
    ]
    found = explain(evidence[0])
    assert found.unexplained == ()
    said = [each.text for each in found.explanations]
    assert len(said) == len(SEVERAL[engine]), said
    assert all(any(re.search(pattern, text) for text in said) for pattern in SEVERAL[engine]), said
    assert all(each.level == "likely" for each in found.explanations)
    assert [each.level for each in proved(found.explanations, evidence[1], "new inputs")] == ["certain"] * len(said)


@pytest.mark.usefixtures("few_checks")
def test_a_defect_that_other_inputs_do_not_show_is_not_certain() -> None:
    found = diagnosed("ScaledOnce", seconds=300.0)
    assert found.first is not None
    assert found.first.cause.value == "lora_scale"
    assert found.first.level == "likely"


@pytest.mark.usefixtures("few_checks")
def test_findings_of_the_case_hide_none_of_the_checks() -> None:
    found = diagnosed("lora_scale_one_and_StaleDown", seconds=300.0)
    causes = [each.cause.value for each in found.explanations]
    assert causes[:2] == ["lora_scale", "stale_values"], [each.line for each in found.explanations]
    assert [each.level for each in found.explanations[:2]] == ["certain", "certain"]
