"""The shapes of the bench, from shapes.toml or the text of a case, and a lower bound of the cost. Imports no torch."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ktverify.spec import cases
from ktverify.spec.cases import Case, read_toml
from ktverify.system.plausible import Work

TABLE = Path(__file__).with_name("shapes.toml")


@dataclass(frozen=True)
class Shape:
    """One timed case; `python -m ktverify repro` takes its id."""

    name: str
    why: str
    case: Case


def weight_bytes(case: Case, experts: int) -> int:
    """Bytes of gate_proj, up_proj and down_proj of so many experts in bf16."""
    return experts * 3 * case.hidden * case.intermediate * 2


def forward_work(case: Case, active: int) -> Work:
    """Work of a forward: the `active` experts' base weights are read once; three base and six LoRA products a row.

    R = T k rows: 6 R H I + 6 R r (H + I) operations. The bytes contain no LoRA, rows and results, so the time is a
    little too low, never too high.
    """
    return Work(weight_bytes(case, active), cases.flops(case))


def backward_work(case: Case, active: int) -> Work:
    """Work of a backward: the same weights, read once; one product for each one of the forward, two if it is LoRA's.

    A product y = x W has two gradients, dx = dy W^T and dW = x^T dy, of as many operations each as the product itself.
    The base weights are frozen, so their dW is not computed: 6 R H I. LoRA is trained and has both: 12 R r (H + I).
    Nothing is computed again: the forward saves x A^T, h A^T, g and u (docs/contract.md, "The layer").
    """
    return Work(weight_bytes(case, active), cases.flops(case, backward=True) - cases.flops(case))


def shapes() -> dict[str, Shape]:
    """All rows of shapes.toml by name, in the file's order. ValueError names a bad row."""
    found = {}
    for name, row in read_toml(TABLE).items():
        try:
            case = Case.parse(row["case"])
            found[name] = Shape(name, row["why"], replace(case, why=row["why"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{TABLE.name}, row {name}: {error}") from error
    return found


def select(texts: Sequence[str]) -> list[Shape]:
    """Shapes by name, by a pattern of names, or as a case (`E=16,k=8,...`); all shapes without `texts`.

    In the order of `texts`, each once. ValueError with the nearest names for an unknown one.
    """
    known = shapes()
    if not texts:
        return list(known.values())
    chosen: dict[str, Shape] = {}
    for text in texts:
        if "=" in text:
            case = Case.parse(text)
            if case.data != "gaussian" or case.lora_dtype != "bfloat16":
                raise ValueError(f"shape {text!r}: the bench takes data=gaussian and lora=bfloat16 only")
            if case.qlen == 0:
                raise ValueError(f"shape {text!r}: T is 0, there is nothing to time")
            short = f"E={case.num_experts},T={case.qlen},r={case.rank}"
            chosen[case.id] = Shape(short if case.name == cases.CUSTOM else case.id, case.why, case)
            continue
        matching = [name for name in known if fnmatch.fnmatchcase(name, text)]
        if not matching:
            near = difflib.get_close_matches(text, known, n=3, cutoff=0.4) or list(known)
            raise ValueError(f"no shape is called {text!r}; there are {', '.join(near)}")
        chosen.update({name: known[name] for name in matching})
    return list(chosen.values())
