"""Hypotheses of a type: a sum kept in bf16, a value rounded on its way, parameters or results cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ktverify.diagnose.causes import Cause
from ktverify.diagnose.situation import Finding, Situation
from ktverify.diagnose.stages import FORMULAS, LEAVES, Change, Formula, Values, label, operands
from ktverify.names import ALL_TENSORS, GRAD_INPUT, GRAD_NAMES, OUTPUT

LOW = torch.bfloat16


def rounded(value: Tensor, dtype: torch.dtype = LOW) -> Tensor:
    """`value` rounded to a type and back to fp64."""
    return value.to(dtype).to(value.dtype)


def running_sum(start: Tensor, parts: list[Tensor]) -> Tensor:
    """The sum of `parts`, rounded to bf16 after every addition."""
    total = start
    for part in parts:
        total = rounded(total + rounded(part))
    return total


def sums_in_bf16(situation: Situation) -> Iterator[Finding]:
    """The sum over slots, over experts, or over tokens is kept in bf16 instead of fp32."""
    for name, text in ((OUTPUT, "output"), (GRAD_INPUT, "grad_input")):
        if name not in situation.actual or not situation.worth((name,), 0.3):
            continue
        for order, total in (("experts", _over_experts(situation, name)), ("slots", _over_slots(situation, name))):
            said = f"the sum over {order} in {text} is kept in bf16, expected fp32"
            yield situation.finding(Cause.ACCUMULATION_TYPE, said, {name: total})
    names = tuple(name for name in GRAD_NAMES if name in situation.actual)
    if situation.worth(names, 0.3):
        for block in (1, 2, 4, 8, 16, 32, 64):
            predicted = {name: _over_tokens(situation, name, block) for name in names}
            step = "" if block == 1 else f" ({block} tokens at a time)"
            said = f"the sum over tokens in the LoRA gradients is kept in bf16{step}, expected fp32"
            yield situation.finding(Cause.ACCUMULATION_TYPE, said, predicted)


def _over_experts(situation: Situation, name: str) -> Tensor:
    total = torch.zeros_like(situation.right[name])
    for v in situation.layer.experts:
        for slot in torch.unique(v.slots).tolist():
            mine = v.slots == slot
            total[v.rows[mine]] = rounded(total[v.rows[mine]] + rounded(v[name][mine]))
    return total


def _over_slots(situation: Situation, name: str) -> Tensor:
    total = torch.zeros_like(situation.right[name])
    for slot in range(situation.case.top_k):
        for v in situation.layer.experts:
            mine = v.slots == slot
            total[v.rows[mine]] = rounded(total[v.rows[mine]] + rounded(v[name][mine]))
    return total


def _over_tokens(situation: Situation, name: str, block: int) -> Tensor:
    total = torch.zeros_like(situation.right[name])
    _, left, right = operands(name)
    for v in situation.layer.experts:
        a, b = v[left], v[right]
        parts = [v["s"] * (a[i : i + block].T @ b[i : i + block]) for i in range(0, len(a), block)]
        total[v.expert] = running_sum(torch.zeros_like(total[v.expert]), parts)
    return total


def cast(situation: Situation) -> Iterator[Finding]:
    """A parameter or a value on the way rounded to bf16, or a result rounded to something coarser, or cut off."""
    for name in (*(leaf for leaf in LEAVES if leaf != "s"), *FORMULAS):
        change: Change = {name: _rounded_stage(name)}
        yield from situation.tried(Cause.ACCUMULATION_TYPE, f"{label(name)} is rounded to bf16", change, rank=2)
    lora = {name: _rounded_stage(name) for name in ("ga", "gb", "ua", "ub", "da", "db")}
    yield from situation.tried(Cause.ACCUMULATION_TYPE, "the LoRA parameters are rounded to bf16", lora, rank=2)
    low = {name: _rounded_stage(name) for name in ("x_ga", "x_ua", "h_da", "dy_db", "dg_gb", "du_ub")}
    yield from situation.tried(Cause.ACCUMULATION_TYPE, "LoRA's low-rank values are rounded to bf16", low, rank=2)
    for text, make in _RESULTS.items():
        for names in ((name,) for name in ALL_TENSORS if name in situation.actual):
            if situation.worth(names):
                said = f"{names[0]} is {text}"
                yield situation.finding(Cause.ACCUMULATION_TYPE, said, {names[0]: make(situation.right[names[0]])}, rank=2)
        everything = {name: make(right) for name, right in situation.right.items() if name in situation.actual}
        yield situation.finding(Cause.ACCUMULATION_TYPE, f"every result is {text}", everything, rank=2)


def _rounded_stage(name: str) -> Formula:
    if name in LEAVES:
        return lambda v: rounded(v[name])
    formula = FORMULAS[name]

    def stage(v: Values) -> Tensor:
        return rounded(formula(v))

    return stage


def _cut_off(value: Tensor) -> Tensor:
    """fp32 with its lower 16 bits zero: rounded towards zero to bf16."""
    return (value.float().view(torch.int32) & -65536).view(torch.float32).double()


_RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut off to bf16, not rounded": _cut_off,
    "rounded to fp8 (e4m3)": lambda value: rounded(value.float(), torch.float8_e4m3fn).double(),
    "rounded to fp8 (e5m2)": lambda value: rounded(value.float(), torch.float8_e5m2).double(),
    "rounded to bf16": rounded,
    "rounded to fp16": lambda value: rounded(value, torch.float16),
}
