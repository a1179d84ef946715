"""Every mutant is killed by the check that its decorator names, and every gate kills one that nothing else kills."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ktverify.checks import registry
from ktverify.checks.causes import Cause
from ktverify.checks.isas import Isa
from ktverify.checks.problem import LiveOracle
from ktverify.checks.target import Target, expect
from ktverify.engines.run import run_case
from ktverify.errors import GateFailed
from ktverify.judge import gates
from ktverify.judge.gates import GATES, Verdict, gates_off
from ktverify.mutants import MUTANTS, Plain
from ktverify.mutants.kills import NOT_OF_ENGINES, Exceeded, KillTable, as_json, ask, candidates, verdict_line, worst
from ktverify.mutants.right_engines import CleanRun, RightEngine, failures_of, judge, right_engines, verdict_lines
from ktverify.spec.cases import Case
from ktverify.spec.inputs import make_inputs
from ktverify.spec.names import ALL_TENSORS, OUTPUT
from tests.support.command_line import call, ends

CASE = Case.parse("E=6,k=2,H=96,I=64,T=24,r=8,alpha=16")
RIGHT = "ktverify.mutants.base:Plain"

EXACT_ODD = "E=5,k=3,H=97,I=47,T=19,r=3,alpha=6,data=integer,routing=uniform,lora=float32@seed=0"
# gate -> a mutant that survives without it, and all checks that kill it; `python -m ktverify mutants` lists them
NEEDED: dict[str, tuple[str, str]] = {
    "non_finite": ("nan_spreads_in_whole_blocks", "forward/nan_row, forward/inf_row"),
    "hidden_non_finite": (
        "nan_comes_out_as_zero",
        "forward/nan_row, backward/nan_row, forward/inf_row, behaviour/non_finite_isolation",
    ),
    "stray": ("idle_experts_beyond_32_not_cleared", "backward/mostly_idle"),
    "mean_rel": ("small_rows_taken_for_padding", "behaviour/outlier_token"),
    "rel_l2": (
        "single_row_with_a_coarse_exp",
        "forward/one_token, backward/one_token, forward/one_token_odd, backward/one_token_odd, "
        "edge/one_token, tp/decode",
    ),
    "rel_l2_own": ("gate_and_up_rounded", "forward/small, backward/small"),
    "exact": ("fp32_gradients_hold_bf16", f"backward/exact_fp32_lora, exact/exact_fp32_lora, exact/{EXACT_ODD}"),
    "loss": (
        "update_by_truncated_differences",
        "training/fp32_parameters, training/odd_sizes_idle_experts, training/tp",
    ),
    "tp": ("tp_parts_with_a_coarse_exp", "tp/gaussian, tp/odd_parts, tp/decode, tp/permuted"),
    "bits": ("one_share_a_thread", "behaviour/threads, behaviour/threads_at_odd_sizes"),
    "form": ("fp32_gradients_come_as_bf16", "edge/multiples_of_nothing_many_rows"),
    "masks": ("dropout_shared_by_gate_and_up", "dropout/elements, dropout/elements_of_most, dropout/next_forward"),
    "written": ("padding_written_behind_the_input", "behaviour/nothing_is_written_at_odd_sizes"),
    "refusal": ("ids_clamped", "refusals/expert id 6"),
    "resources": ("every_expert_packed", "processes/idle_experts_take_no_memory"),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_cause_has_a_mutant() -> None:
    assert len(MUTANTS) >= 45
    # an engine that ends its process is no mutant, because a mutant runs beside its judge: tests/support/sick.py
    assert {mutant.cause for mutant in MUTANTS.values()} == set(Cause) - {Cause.CRASH}
    assert all(mutant.what.endswith(".") for mutant in MUTANTS.values())


@pytest.mark.parametrize("name", [mutant.name for mutant in sorted(MUTANTS.values(), key=lambda mutant: mutant.check)])
def test_mutant_is_killed_by_its_check(name: str) -> None:
    mutant = MUTANTS[name]
    found = ask(registry.find(mutant.check), mutant.engine)
    assert mutant.gate in {exceeded.gate for exceeded in found}, found


def test_base_engine_passes_all_of_their_checks() -> None:
    for key in {mutant.check for mutant in MUTANTS.values()}:
        assert ask(registry.find(key), RIGHT) == [], key


def test_needed_lists_every_gate() -> None:
    assert set(NEEDED) == set(GATES) - {NOT_OF_ENGINES}


@pytest.mark.parametrize("gate", NEEDED)
def test_mutant_survives_without_its_gate(gate: str) -> None:
    name, checks = NEEDED[gate]
    for key in checks.split(", "):
        assert {exceeded.gate for exceeded in ask(registry.find(key), MUTANTS[name].engine)} == {gate}, key
        assert ask(registry.find(key), MUTANTS[name].engine, gate) == [], key


def test_without_trust_an_emptied_case_passes_a_wrong_engine() -> None:
    """trust judges the case: with a grad_output of zero, every backward is right."""
    inputs = make_inputs(CASE)
    empty = replace(inputs, grad_output=torch.zeros_like(inputs.grad_output))
    expected = LiveOracle.of(empty)
    actual = run_case(MUTANTS["up_gradient_from_dg"].factory, CASE, inputs=empty)

    name = "grad_up_lora_b"
    difference, rounding = expected.compare(name, actual[name]), expected.rounding[name]
    assert gates.judge(CASE, name, difference, rounding).verdict is Verdict.MISTRUSTED
    assert gates.judge(CASE, name, difference, rounding, gates_off=gates_off("trust")).verdict is Verdict.PASS


def test_a_target_leaves_out_only_the_gates_that_are_off() -> None:
    with pytest.raises(ValueError, match="no_such_gate"):
        gates_off("no_such_gate")
    target = Target(RIGHT, gates_off=gates_off("bits"))
    zero, one = {OUTPUT: torch.zeros(2)}, {OUTPUT: torch.ones(2)}
    target.expect(False, "left out", "bits")
    target.expect_same_bits("left out", zero, one, (OUTPUT,))
    with pytest.raises(GateFailed):
        target.expect(False, "applied", "form")
    with pytest.raises(GateFailed):
        target.expect_same_bits("applied", zero, one, (OUTPUT,), "written")
    with pytest.raises(GateFailed):
        Target(RIGHT).expect(False, "applied", "bits")


def test_gate_failed_has_its_text_and_gates() -> None:
    with pytest.raises(GateFailed) as failed:
        expect(False, "a sentence", "tp", 2.5)
    assert str(failed.value) == "a sentence"
    assert failed.value.exceeded == (("tp", 2.5),)


def test_surviving_mutant_fails_the_verdict() -> None:
    kills = {
        "lora_scale_one": {"forward/small": [Exceeded("rel_l2", 34.0, ""), Exceeded("mean_rel", 6.0, "")]},
        "ids_clamped": {"refusals/expert id 6": [Exceeded("refusal", float("inf"), "")]},
        "never_the_same": {},
    }
    result = KillTable(3, kills, {"refusal": ["ids_clamped"], "bits": []})
    assert verdict_line(result) == "FAIL 2 of 3 mutants killed, 3 checks asked"
    assert result.alive == ["never_the_same"]
    assert result.idle_gates == ["bits"]
    assert worst(result.kills["lora_scale_one"]).used == 34.0
    assert candidates(result.kills, "refusal") == ["ids_clamped"]
    assert candidates(result.kills, "rel_l2") == []
    document = json.loads(as_json(result))
    assert document["mutants"]["ids_clamped"]["killed_by"] == {"refusals/expert id 6": [["refusal", None]]}
    assert document["killed_by_this_gate_only"] == {"refusal": ["ids_clamped"], "bits": []}


def test_base_engine_keeps_the_strict_limits() -> None:
    assert Plain.fp32_sums
    inputs = make_inputs(CASE)
    expected, actual = LiveOracle.of(inputs), run_case(Plain, CASE, inputs=inputs)
    for name in ALL_TENSORS:
        difference, rounding = expected.compare(name, actual[name]), expected.rounding[name]
        judgement = gates.judge(CASE, name, difference, rounding, own_engine=True)
        assert judgement.verdict is Verdict.PASS, judgement.line


# ---- right engines


def test_clean_runs_every_right_engine() -> None:
    everyone = [engine.label for engine in right_engines()]
    done = call("clean", "--runs", len(everyone), "--jobs", 1, "--cases", "one_token_odd,tiny")
    ends(done, 0)
    assert done.stdout.startswith(f"PASS {len(everyone)} of {len(everyone)} runs")
    rows = {match[1]: match[2] for match in re.finditer(r"^(\S+(?: \S+)*) +1 +(\d+) ", done.stdout, re.MULTILINE)}
    assert sorted(rows) == sorted(everyone)
    assert all(int(tensors) >= 9 for tensors in rows.values()), rows


def test_wrong_engine_is_noticed() -> None:
    engine = MUTANTS["lora_scale_one"].engine
    right, wrong = judge(1, [RightEngine("torch_bf16", Isa()), RightEngine(engine, Isa())], "small")
    assert (right.bad, wrong.bad) == (False, True)
    assert verdict_lines([right, wrong], "small")[0].startswith("FAIL 1 of 2 runs")
    said = "\n".join(failures_of([right, wrong]))
    assert f"python -m ktverify repro 'small@seed=1' --engine {engine} --fresh" in said
    # a run that compared nothing is bad
    assert CleanRun("torch_bf16", 1).bad
    assert not CleanRun("torch_bf16", 1, compared=1).bad
