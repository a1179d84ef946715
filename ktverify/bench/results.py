"""Compare what an engine computed with the oracle: a wrong result gets no time.

The question is only whether a result is right at all. How accurate it is, the suites judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# rel_l2 above which a result is wrong. A right bf16 engine has 2e-3 to 1e-2
WRONG = 5e-2


def compare_results(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float | str]:
    """For each name in `expected` the rel_l2 of the actual tensor, or in words what is wrong with it.

    Tensors of any floating dtype; those of one name have the same shape if they are right.
    """
    from ktverify.judge.metrics import compare

    found: dict[str, float | str] = {}
    for name, right in expected.items():
        if name not in actual:
            found[name] = "is missing"
            continue
        try:
            difference = compare(actual[name], right)
        except ValueError as error:
            found[name] = str(error)
            continue
        broken = difference.non_finite
        found[name] = f"holds {broken} NaN or Inf" if broken else difference.rel_l2
    return found


def first_wrong(found: Mapping[str, float | str]) -> str:
    """What is wrong with the first wrong result of compare_results; "" if all are right."""
    for name, value in found.items():
        if isinstance(value, str):
            return f"{name} {value}"
        if not value <= WRONG:
            return f"{name} is wrong: rel_l2 {value:.1e}, at most {WRONG:.0e}"
    return ""


def errors_of(found: Mapping[str, float | str]) -> dict[str, float]:
    """The rel_l2 of the results that have one."""
    return {name: value for name, value in found.items() if not isinstance(value, str)}
