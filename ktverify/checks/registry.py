"""All checks, in the order of docs/contract.md: the one list that pytest, `mutants` and `diagnose` ask.

A module that enters checks is imported here; nothing else lists them.
"""

from __future__ import annotations

from ktverify.checks import (  # noqa: F401 - importing them enters their checks
    accuracy,
    behaviour,
    calls,
    dropout,
    edge_inputs,
    exact,
    expert_parallel,
    hybrid,
    native_isa,
    native_memory,
    processes,
    properties,
    quantised,
    quantised_files,
    quantised_refusals,
    refusals,
    tensor_parallel,
    trajectory,
)
from ktverify.checks.check import ENTERED, Check
from ktverify.checks.target import Target
from ktverify.engines import registry as engines
from ktverify.isolation.child import ChildPool

# the modules that the fork server of the checks' processes imports once
PRELOAD = (__name__,)
# the order of the contract: right numbers first, then what a layer owes beyond them
KINDS = (
    "forward",
    "backward",
    "exact",
    "edge",
    "behaviour",
    "dropout",
    "refusals",
    "quantised",
    "quantised_files",
    "quantised_refusals",
    "quantised_memory",
    "hybrid",
    "expert_parallel",
    "tp_constraint",
    "tp",
    "training",
    "processes",
    "property",
    "native",
    "isa_choice",
    "dropped",
)


def checks(*kinds: str) -> list[Check]:
    """The checks of these kinds (default: of all), in the order of KINDS. KeyError for a kind that there is not."""
    wanted = kinds or KINDS
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown:
        raise KeyError(f"no check is of the kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    return sorted((one for one in ENTERED.values() if one.kind in wanted), key=lambda one: KINDS.index(one.kind))


def run(check: Check, target: Target) -> None:
    """Run a check at each of its tensor parallel degrees, in a new process if it needs one."""
    if check.fresh_process:
        with ChildPool(preload=PRELOAD, hosts=not engines.ours(target.engine)) as pool:
            pool.call_fresh(check.every_tp, target)
    else:
        check.every_tp(target)


def find(id: str) -> Check:
    """The check of that id. KeyError for one that there is not."""
    if id not in ENTERED:
        raise KeyError(f"there is no check {id!r}")
    return ENTERED[id]


def of_any_engine() -> list[Check]:
    """Those that mutants and diagnose ask: not inside the native engine, no drawn case, default tier only."""
    return [
        one for one in checks() if not (one.internal or one.drawn) and (one.case is None or one.case.tier == "default")
    ]
