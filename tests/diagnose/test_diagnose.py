"""The diagnosis names the right cause of mutants, and no cause for a right engine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ktverify.checks import accuracy
from ktverify.checks.causes import Cause
from ktverify.checks.target import Target
from ktverify.diagnose import diagnose as diagnosing
from ktverify.diagnose import hook, search
from ktverify.diagnose.diagnose import diagnose, quick
from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.formulas import FORMULAS, LABELS, LEAVES, LayerValues, downstream, operands
from ktverify.diagnose.search import explain, one_thread, reduced
from ktverify.engines.registry import find
from ktverify.engines.run import run_case
from ktverify.judge import reference
from ktverify.mutants import MUTANTS
from ktverify.mutants.diagnosed import LEAST, diagnosed
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS, BACKWARD_TENSORS, BASE_NAMES, GRAD_NAMES, OUTPUT
from tests.support.command_line import call, ends

pytestmark = pytest.mark.slow
SMALL = Case.parse("E=5,k=2,H=72,I=40,T=20,r=8,alpha=16")
ODD = Case.parse("E=5,k=3,H=33,I=21,T=9,r=3,alpha=5,routing=masked")
MUTANT = "ktverify.mutants."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(SMALL)


@pytest.fixture(scope="module")
def peer(inputs: Inputs) -> Tensors:
    return in_bf16(inputs)


def in_bf16(inputs: Inputs) -> Tensors:
    """What plain torch in bf16 gives."""
    return run_case(find("torch_bf16"), inputs.case, inputs=inputs)


def explained(inputs: Inputs, actual: Tensors) -> search.Diagnosis:
    """The diagnosis from the tensors only."""
    with one_thread():
        return explain(Evidence.of(inputs, actual, seconds=300.0))


def cause_of(inputs: Inputs, **wrong: object) -> Explanation:
    """The first explanation of the tensors of other inputs."""
    found = explained(inputs, in_bf16(replace(inputs, **wrong))).first  # type: ignore[arg-type]
    assert found is not None
    return found


# ---- mutants


def test_causes_of_the_mutants_are_found() -> None:
    # a sample; `python -m ktverify diagnose --mutants` diagnoses all and fails below LEAST
    results = list(diagnosed(list(MUTANTS.values())[::13]))
    right = sum(result.right for result in results)
    table = "\n".join(result.line for result in results if not result.right)
    assert len(results) >= 9
    assert right >= LEAST * len(results), f"{right} of {len(results)} causes are right\n{table}"


# ---- the table of formulas


@pytest.mark.parametrize("case", [SMALL, ODD], ids=["plain", "odd"])
def test_formulas_equal_the_oracle(case: Case) -> None:
    inputs = make_inputs(case)
    right = reference.forward_backward(inputs)
    found = LayerValues.of(inputs).tensors
    for name in ALL_TENSORS:
        assert torch.allclose(found[name], right[name], rtol=1e-12, atol=1e-12 * float(right[name].abs().max())), name


def test_changed_formula_affects_only_its_dependents(inputs: Inputs) -> None:
    layer = LayerValues.of(inputs)
    found = layer.changed({"dsilu": lambda v: 2 * FORMULAS["dsilu"](v)})
    assert set(found) == {"grad_input", "grad_gate_lora_a", "grad_gate_lora_b"}
    # dg, and all that comes of it, is linear in silu'
    assert torch.allclose(found["grad_gate_lora_b"], 2 * layer.tensors["grad_gate_lora_b"])
    assert OUTPUT in downstream("s")
    assert operands("g_lora") == ("s", "x_ga", "gb")
    assert set(LABELS) <= {*FORMULAS, *LEAVES}


# ---- no cause


def test_right_engine_has_nothing_to_explain() -> None:
    found = diagnose(SMALL, Target(MUTANT + "base:Plain"), seconds=300.0)
    assert (found.line, found.explanations, found.note) == ("nothing to explain", [], "")
    assert found.tried == len(quick()) > 100, "a check did not run"


@pytest.mark.parametrize("name", [OUTPUT, "grad_up_lora_b"])
def test_random_noise_fits_no_hypothesis(inputs: Inputs, peer: Tensors, name: str) -> None:
    draw = torch.Generator().manual_seed(3)
    noise = 0.2 * peer[name].float().std() * torch.randn(peer[name].shape, generator=draw)
    found = explained(inputs, {**peer, name: (peer[name].float() + noise).to(peer[name].dtype)})
    assert found.failing == (name,)
    assert found.first is None, found.line
    assert re.fullmatch(rf"cause: none of \d+ hypotheses fits \({name}\)", found.line)


# ---- fitted numbers


@pytest.mark.parametrize("factor", [0.25, 1.7, 3.0])
def test_factor_is_fitted(inputs: Inputs, factor: float) -> None:
    found = cause_of(inputs, case=replace(SMALL, alpha=SMALL.alpha * factor))
    assert found.cause is Cause.LORA_SCALE
    number = re.search(r"found ([\d.]+)", found.text)
    assert number is not None
    assert float(number.group(1)) == pytest.approx(2.0 * factor, rel=0.02)


def test_permutation_is_matched(inputs: Inputs) -> None:
    order = torch.tensor([0, 3, 2, 4, 1])
    found = cause_of(inputs, **{name: getattr(inputs, name)[order] for name in BASE_NAMES})
    assert found.cause is Cause.EXPERT_PERMUTATION
    assert "1 has 3's, 3 has 4's, 4 has 1's (base weights)" in found.text


def test_missing_expert_and_slot_are_named(inputs: Inputs) -> None:
    ids = inputs.expert_ids
    found = cause_of(inputs, expert_ids=torch.where(ids == 3, -1, ids))
    assert (found.cause, found.text) == (Cause.EXPERT_WRONG, "expert 3's share is missing")
    found = cause_of(inputs, expert_ids=torch.where(torch.arange(2) == 1, -1, ids))
    assert (found.cause, found.text) == (Cause.SLOT_WRONG, "slot 1's share is missing")


def test_wrong_dtype_is_reported(inputs: Inputs, peer: Tensors) -> None:
    found = explained(inputs, {**peer, **{name: peer[name].float() for name in GRAD_NAMES}})
    assert "grad_gate_lora_a is float32, expected bfloat16, and 5 more" in found.line


def test_simpler_of_two_equal_hypotheses_comes_first() -> None:
    tried = ((3, 10.0, 0.9), (1, 10.5, 0.9), (1, 20.0, 0.9), (1, 1.0, 0.4))
    found = [Explanation(Cause.OTHER, f"{rank} {left}", share, left, rank=rank) for rank, left, share in tried]
    assert [each.text for each in search.ranked(found)] == ["1 10.5", "3 10.0", "1 20.0"]


def test_large_case_is_reduced() -> None:
    case = Case.parse("E=12,k=2,H=2048,I=768,T=8,r=4,alpha=8")
    inputs = make_inputs(case)
    small, note = reduced(inputs)
    assert len(small.active) < len(inputs.active)
    assert set(torch.unique(small.expert_ids).tolist()) == {-1, *small.active}
    assert str(len(inputs.active)) in note


# ---- the hook


UNSCALED = Target(MUTANT + "lora:lora_b_gradient_unscaled")


def test_failing_case_shows_its_cause_once() -> None:
    result = accuracy.check_case(UNSCALED, SMALL, fresh=True, tensors=BACKWARD_TENSORS)
    hook.add_cause(result, UNSCALED)
    cause = r"\ncause: LoRA scaling in the gradients of B: found 1.0, expected"
    with pytest.raises(AssertionError, match=cause) as said:
        accuracy.assert_passed(result.records)
    assert str(said.value).count("cause: ") == 1


def test_broken_diagnosis_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in a hypothesis")

    result = accuracy.check_case(UNSCALED, SMALL, fresh=True)
    before = [record.verdict for record in result.records]
    monkeypatch.setattr(diagnosing, "diagnose", broken)
    hook.add_cause(result, UNSCALED)
    assert [record.verdict for record in result.records] == before
    said = "\n".join(record.message for record in result.records)
    assert "cause: not found, the diagnosis itself failed: ZeroDivisionError: in a hypothesis" in said


def test_causes_of_a_process_take_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    result = accuracy.check_case(UNSCALED, SMALL, fresh=True, tensors=BACKWARD_TENSORS)
    monkeypatch.setattr(hook, "_spent", 0.0)
    monkeypatch.setattr(hook, "SECONDS_IN_ALL", 1e-9)
    assert "cause: LoRA scaling" in hook.cause_line(result, UNSCALED)
    assert hook.cause_line(result, UNSCALED).startswith("cause: not looked for, the search took ")


def test_a_tensor_that_should_be_zero_has_no_growth_to_allow(inputs: Inputs, peer: Tensors) -> None:
    # of one token without a weight: its gradients are 0, and no prediction of other numbers is within their budgets
    here = make_inputs(SMALL)
    here = replace(here, weights=torch.zeros_like(here.weights))
    evidence = Evidence.of(here, {name: torch.zeros_like(peer[name]) for name in GRAD_NAMES})
    predicted = {GRAD_NAMES[0]: evidence.right[GRAD_NAMES[0]] + 1.0}
    assert evidence.over(evidence.left(predicted), predicted) == [GRAD_NAMES[0]]


def test_passing_case_gets_no_cause() -> None:
    result = accuracy.check_case(Target("torch_bf16"), SMALL, fresh=True)
    before = list(result.records)
    hook.add_cause(result, Target("torch_bf16"))
    assert result.records == before


# ---- commands


def test_command_names_the_cause() -> None:
    options = ("--tensor", OUTPUT, "--json", "--seconds", "5")
    done = call("diagnose", SMALL.id, "--engine", MUTANT + "routes:no_routing_weight", *options)
    ends(done, 1)
    findings = json.loads(done.stdout)["findings"]
    assert findings[0]["cause"] == "routing_weight"
    assert findings[0]["explains"] > 0.99


def test_debug_nan_finds_the_input_and_saves_a_replay(tmp_path: Path) -> None:
    path = tmp_path / "nan.safetensors"
    options = ("--engine", "torch_bf16", "--save", path)
    text = ends(call("debug", "nan", "nan_row", *options), 1)
    assert re.search(r"oracle: nan in x, expert \d+, token 12, index \[\d+, \d+\]", text)
    kept = load_file(path)
    assert not torch.isfinite(kept["inputs.hidden_states"][12]).all()
    assert "stages.h" in kept
    assert ends(call("debug", "nan", SMALL.id, *options), 0).strip() == "every stage and every tensor is finite"


def test_debug_gradients_lists_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = ends(call("debug", "gradients", SMALL.id, "--engine", "torch_bf16"), 0)
    assert [line.split()[0] for line in text.splitlines()[1:]] == list(ALL_TENSORS)


@pytest.mark.parametrize(
    ("size", "degree", "code", "says"),
    [("2048", "4", 0, "4 parts of 512"), ("2049", "4", 1, "degrees that would work: 1, 3"), ("3", "4", 1, "be 4")],
)
def test_debug_tp_explains(size: str, degree: str, code: int, says: str) -> None:
    assert says in ends(call("debug", "tp", "--intermediate-size", size, "--threadpool-count", degree), code)
