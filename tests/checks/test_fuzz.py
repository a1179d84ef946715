"""The fuzzer repeats by its seed, finds engines that are wrong after some calls alone, and accuses no right one."""

from __future__ import annotations

import pytest

from ktverify.checks import fuzz
from ktverify.checks.target import Target
from ktverify.mutants import MUTANTS
from tests.support.command_line import call, ends

# engines that are right in a new layer's first call, and wrong later, for some sizes, or for some arguments
FOUND = (
    "oldest_first",
    "idle_gradients_stale",
    "packed_weights_outlive_a_reload",
    "layers_share_a_buffer",
    "unsaved_forward_overwrites",
    "clearing_drops_outstanding",
    "strides_ignored",
    "input_scaled_in_place",
    "one_share_a_thread",
    "refused_backward_uses_its_forward_up",
    "cache_depth_ignored",
)
SESSIONS = 40


def session(engine: str, seed: int) -> str:
    """What the session of `seed` finds wrong; "" for nothing."""
    try:
        calls, compared = fuzz.run_session(Target(engine), seed)
    except AssertionError as error:
        return str(error)
    assert calls > fuzz.CALLS / 2
    assert compared > 0
    return ""


@pytest.mark.parametrize("engine", ["native", "torch_bf16"])
def test_right_engines_pass(engine: str) -> None:
    assert [text for seed in range(6) if (text := session(engine, seed))] == []


@pytest.mark.parametrize("name", FOUND)
def test_wrong_engines_are_found(name: str) -> None:
    found = next((text for seed in range(SESSIONS) if (text := session(MUTANTS[name].engine, seed))), "")
    assert found
    # the calls are listed, and the seed repeats them
    assert len(found.splitlines()) > 2


def test_a_seed_repeats_its_session() -> None:
    texts = [session(MUTANTS[FOUND[0]].engine, seed) for seed in (3, 3)]
    assert texts[0] == texts[1]


def test_the_command_says_how_to_repeat_a_session() -> None:
    text = ends(call("fuzz", "--engine", MUTANTS[FOUND[0]].engine, "--sessions", SESSIONS, "--minutes", 5), 1)
    assert "FAIL session " in text
    assert f"python -m ktverify fuzz --engine {MUTANTS[FOUND[0]].engine} --seed " in text
    text = ends(call("fuzz", "--sessions", 2, "--isa", "scalar"), 0)
    assert "PASS 2 sessions" in text
