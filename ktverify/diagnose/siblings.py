"""Cases beside the one that was asked about: what is right at one size may be wrong at another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ktverify.cases import Case
from ktverify.data import make_inputs
from ktverify.diagnose.causes import Cause
from ktverify.diagnose.situation import Finding, Situation

if TYPE_CHECKING:
    from ktverify.diagnose.behaviour import Stand

# what each adds to a plain case: sizes that are multiples of nothing, one row, many, many slots, kinds of routing,
# of numbers and of parameters
PANEL: tuple[str, ...] = (
    "E=5,k=3,H=97,I=47,T=33,r=3,alpha=5",
    "E=8,k=3,H=64,I=48,T=16,r=4,alpha=16,map=permuted",
    "E=6,k=3,H=64,I=48,T=24,r=8,alpha=16,routing=duplicate",
    "E=6,k=3,H=64,I=48,T=24,r=8,alpha=16,routing=masked",
    "E=4,k=2,H=64,I=48,T=24,r=8,alpha=16,lora=float32",
    "E=4,k=2,H=64,I=48,T=1,r=8,alpha=16",
    "E=16,k=2,H=64,I=48,T=96,r=8,alpha=16,routing=one_expert",
    "E=2,k=2,H=64,I=48,T=300,r=8,alpha=16",
    "E=16,k=8,H=64,I=48,T=32,r=8,alpha=16",
    "E=4,k=2,H=64,I=48,T=32,r=33,alpha=32",
    "E=4,k=2,H=64,I=48,T=32,r=8,alpha=512",
    "E=4,k=2,H=64,I=256,T=32,r=8,alpha=16,data=large",
    "E=4,k=2,H=64,I=48,T=32,r=8,alpha=16,data=tiny",
)


def best(situation: Situation, cause: Cause, what: str) -> Iterator[Finding]:
    """The first cause of a case beside the one that was asked about; `cause` alone where none fits."""
    from ktverify.diagnose.search import explain

    found = explain(situation)
    if found.first is not None:
        yield replace(found.first, text=f"{what}: {found.first.text}", complete=True)
    else:
        said = f"{what}: {', '.join(situation.failing)} wrong, by what none of {found.tried} hypotheses tells"
        yield Finding(cause, said, 1.0, -1.0, rank=4)


def others(stand: Stand, situation: Situation) -> Iterator[Finding]:
    """The first case of PANEL that the engine fails, explained."""
    for text in PANEL:
        if time.monotonic() > situation.deadline:
            return
        case = Case.parse(text)
        inputs = make_inputs(case)
        found = Situation.of(case, inputs, stand.probe.run(case, inputs, tp=1), probe=replace(stand.probe, tp=1))
        if found.failing:
            yield from best(found, Cause.OTHER, f"at {case.spec}")
            return
