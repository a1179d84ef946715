"""Ask an engine one check of the registry: which gates it exceeds."""

from __future__ import annotations

from dataclasses import dataclass

from ktverify.checks import registry
from ktverify.checks.check import Check
from ktverify.checks.target import Target
from ktverify.errors import GateFailed
from ktverify.judge import gates

ENGINE_RAISED = "raised"  # the engine raised where it should have computed: no gate, and none can hide it
PRECONDITION = "check"  # a check that could not be made


@dataclass(frozen=True)
class Exceeded:
    """One gate that a check found exceeded. used: the share of its budget, inf where it has none. says: one line."""

    gate: str
    used: float
    says: str


def ask(check: Check, engine: str, *off: str) -> list[Exceeded]:
    """What `check` finds wrong with `engine`, with the gates `off` left out; [] if nothing."""
    target = Target(engine, gates_off=gates.gates_off(*off))
    try:
        registry.run(check, target)
    except GateFailed as failed:
        says = str(failed).partition("\n")[0]
        return [Exceeded(gate, used, says) for gate, used in failed.exceeded]
    except AssertionError as error:
        return [Exceeded(PRECONDITION, float("inf"), str(error).partition("\n")[0])]
    except Exception as error:
        return [Exceeded(ENGINE_RAISED, float("inf"), f"{type(error).__name__}: {error}".partition("\n")[0])]
    return []
