"""Right numbers in results of a wrong form pass nowhere: each command and each kind of check that judges numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ktverify.checks import accuracy, exact, judging, properties, tensor_parallel, training_steps, trajectory
from ktverify.checks.problem import LiveOracle
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.reproducer.confirm import CaseRun, _Reproducer
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import GRAD_NAMES
from tests.support.command_line import call

CASE = Case.parse("E=4,k=2,H=64,I=32,T=17,r=8,alpha=16@seed=1")
TRAINED = Case.parse("E=4,k=2,H=64,I=32,T=17,r=8,alpha=16,lora=float32")
INTEGER = Case.parse("E=4,k=2,H=64,I=32,T=17,r=8,alpha=16,data=integer")

# engine of tests/support/forms.py -> the tensor that has a wrong form, and words of the message. An engine that copies
# its result into an argument gets the message about the changed argument, which comes before that about the form.
WRONG = {
    "Fp32Output": ("output", "output is float32, expected bfloat16"),
    "OutputInTheInput": ("output", "forward_sft wrote into, or beside, hidden_states"),
    "Fp32GradInput": ("grad_input", "grad_input is float32, expected bfloat16"),
    "Fp64Gradients": ("grad_up_lora_b", "grad_up_lora_b is float64, expected "),
    "Bf16RoutingGradient": ("grad_weights", "grad_weights is bfloat16, expected float32"),
    "FlatGradient": ("grad_gate_lora_a", "grad_gate_lora_a is [32, 64], expected [4, 8, 64]"),
    "GradInputInGradOutput": ("grad_input", "backward wrote into, or beside, grad_output"),
    "GradientsInTheParameters": ("grad_up_lora_a", "grad_up_lora_a lies in the memory of grad_gate_lora_a"),
}
REUSED = "grad_input lies in the memory of "


def _of_case(target: Target) -> None:
    records = accuracy.check_case(target, CASE).records
    assert {record.verdict for record in records} <= {"PASS", "FAIL"}
    bad = [record for record in records if record.verdict != "PASS"]
    if bad:
        assert {gate.gate for record in bad for gate in record.failed_gates} <= {"form"}
        raise GateFailed("\n".join(record.message for record in bad), ())


def _of_training(target: Target) -> None:
    for _, records in training_steps.check_training(target, CASE, steps=2):
        bad = [record for record in records if record.verdict != "PASS"]
        if bad:
            raise GateFailed("\n".join(record.message for record in bad), ())


JUDGES: dict[str, Callable[[Target], object]] = {
    "accuracy": _of_case,
    "training": _of_training,
    "training_loop": lambda target: trajectory.check_trajectory(target, TRAINED),
    "exact": lambda target: exact.check_exact(target, INTEGER),
    "tp": lambda target: tensor_parallel.run_degree(target, CASE),
    "property": lambda target: properties.check_property(target, "within_budget", CASE),
    "properties that add": lambda target: properties.check_property(target, "accumulated_gradients", CASE),
}


# the last one asks for the LoRA gradients alone
ASKED = [
    (e, j) for e, (tensor, _) in WRONG.items() for j in JUDGES if tensor in GRAD_NAMES or j != "properties that add"
]


@pytest.mark.parametrize(("engine", "judge"), ASKED)
def test_a_wrong_form_fails_where_numbers_are_judged(engine: str, judge: str) -> None:
    with pytest.raises(GateFailed, match=re.escape(WRONG[engine][1])):
        JUDGES[judge](Target(f"tests.support.forms:{engine}"))


@pytest.mark.parametrize("judge", ["training", "training_loop"])
def test_memory_of_an_earlier_result_fails(judge: str) -> None:
    with pytest.raises(GateFailed, match=REUSED):
        JUDGES[judge](Target("tests.support.forms:SameMemoryEveryTime"))


@pytest.mark.parametrize("judge", JUDGES)
def test_a_right_form_passes(judge: str) -> None:
    JUDGES[judge](Target("torch_bf16"))


@pytest.mark.parametrize(
    "command", [("repro", CASE.id), ("verify", "--case", CASE.id, "--steps", "2")], ids=lambda c: c[0]
)
@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("Fp32Output", "output is float32, expected bfloat16"),
        ("OutputOfAnotherClass", "the result is a Claims, it must be a tensor"),
        ("OutputOfNegatives", "the result is a NegativeTensor, it must be a tensor"),
        ("Fp64Gradients", "is float64, expected bfloat16"),
    ],
)
def test_a_wrong_form_fails_in_the_commands(engine: str, words: str, command: tuple[str, ...]) -> None:
    done = call(*command, "--engine", f"tests.support.forms:{engine}")
    assert done.exit_code == 1, done.output
    assert words in done.output


@pytest.mark.parametrize("odd", [torch._neg_view, lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)])
def test_values_that_are_not_in_the_memory_are_a_wrong_form(odd: Callable[[torch.Tensor], torch.Tensor]) -> None:
    output = odd(torch.zeros(CASE.qlen, CASE.hidden, dtype=torch.bfloat16))
    assert "whose values are not those in its memory" in judging.wrong_forms(CASE, {"output": output})["output"]


def test_a_reproducer_judges_the_form_too(tmp_path: Path) -> None:
    where = CaseRun(CASE.id)
    reproducer = _Reproducer(where, "tests.support.unruly:Doubling", tmp_path, "")
    reproducer.oracle = LiveOracle.of(make_inputs(CASE))
    right = {name: tensor.to(torch.bfloat16) for name, tensor in reproducer.oracle.tensors.items()}
    right["grad_weights"] = right["grad_weights"].float()
    assert dict(reproducer._wrong(right, exact=False)) == {}
    wrong = {**right, "output": right["output"].float()}
    assert dict(reproducer._wrong(wrong, exact=False)) == {"output": WRONG["Fp32Output"][1]}


def test_shared_memory_is_found_to_the_byte() -> None:
    block = torch.zeros(4, 6)
    apart = [(block[:2], block[2:]), (block[:, ::2], block[:, 1::2]), (block, torch.zeros(4, 6)), (block[:0], block)]
    shared = [(block[:3], block[2:]), (block[:, ::2], block[:, 2]), (block, block.T), (block, block.view(torch.int32))]
    assert not any(judging.share_memory(*pair) for pair in apart)
    assert all(judging.share_memory(*pair) for pair in shared)
    assert judging.overlaps_itself(torch.zeros(1).expand(3))
    assert not any(judging.overlaps_itself(each) for each in (block.T, block[:, ::2], torch.zeros(1).expand(1)))
