"""Hypotheses of rounding: a sum kept in bf16, a value rounded on its way, a result rounded in another way.

Each is tested with and without the roundings that every engine may have (docs/contract.md: operands are bf16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Evidence, Explanation
from ktverify.diagnose.formulas import (
    FORMULAS,
    FORWARD,
    LEAVES,
    Change,
    ExpertValues,
    Formula,
    add_up,
    label,
    operands,
    recomputed,
    with_operands,
)
from ktverify.spec.names import ALL_TENSORS, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT

LOW = torch.bfloat16
BLOCKS = (16, 32, 64, 128, 256)
_MOST = 5  # roundings that are combined
# the products of two matrices whose sum runs over H, I or r: all but the second product of each LoRA part, and those
_PRODUCTS = (
    "x_ga", "x_ua", "g_base", "u_base", "h_da", "y_base", "dy_db", "dh_base", "dg_gb", "du_ub", "dx_gate", "dx_up",
)  # fmt: skip
_LORA_PRODUCTS = ("g_lora", "u_lora", "y_lora", "dh_lora", "dx_gate_lora", "dx_up_lora")


def rounded(value: Tensor, dtype: torch.dtype = LOW) -> Tensor:
    """`value` rounded to a type and back to fp64."""
    return value.to(dtype).to(value.dtype)


def types(evidence: Evidence) -> Iterator[Explanation]:
    """Sums kept in bf16, values rounded on their way, results rounded in another way."""
    for base in (_OPERANDS, {}):
        experts = [recomputed(v, base) for v in evidence.layer.experts]
        right = {name: add_up(evidence.inputs, experts, name) for name in evidence.actual}
        yield from _sums(evidence, experts, right)
        yield from _blocks(evidence, base)
        yield from _results(evidence, right)
        yield from _greedy(evidence, base, right)


def _rounded_value(name: str) -> Formula:
    return lambda v: rounded(v[name])


def _stage(name: str) -> Formula:
    """The formula of a leaf or stage, rounded to bf16."""
    return _rounded_value(name) if name in LEAVES else lambda v: rounded(FORMULAS[name](v))


_OPERANDS: dict[str, Formula] = {name: _stage(name) for name in ("h", "dy", "dg", "du")}


# ---- sums


def _sums(evidence: Evidence, experts: list[ExpertValues], right: dict[str, Tensor]) -> Iterator[Explanation]:
    for name, what in ((OUTPUT, "slots"), (GRAD_INPUT, "experts")):
        if evidence.worth((name,), 0.3):
            for order, total in _running(experts, right[name], name, evidence.case.top_k):
                said = f"the sum over {what} in {name} is kept in bf16, expected fp32"
                yield evidence.explanation(Cause.ACCUMULATION_TYPE, said, {**right, name: total}, details=(order,))
    names = tuple(name for name in GRAD_NAMES if name in evidence.actual)
    if evidence.worth(names, 0.3):
        for block in (1, 2, 4, 8, *BLOCKS):
            predicted = {name: _over_tokens(experts, right[name], name, block) for name in names}
            step = "" if block == 1 else f" ({block} at a time)"
            said = f"the sum over tokens{step} in the LoRA gradients is kept in bf16, expected fp32"
            yield evidence.explanation(Cause.ACCUMULATION_TYPE, said, {**right, **predicted})


def _running(experts: list[ExpertValues], right: Tensor, name: str, slots: int) -> Iterator[tuple[str, Tensor]]:
    """(order, sum) of the experts' terms: rounded after every expert, also every term, or after every slot."""
    for order, term in (("expert by expert", lambda t: t), ("expert by expert, each rounded", rounded)):
        total = torch.zeros_like(right)
        for v in experts:
            total = rounded(total.index_add(0, v.rows, term(v[name])))
        yield order, total
    total = torch.zeros_like(right)
    for slot in range(slots):
        for v in experts:
            mine = v.slots == slot
            total = total.index_add(0, v.rows[mine], v[name][mine])
        total = rounded(total)
    yield "slot by slot", total


def _over_tokens(experts: list[ExpertValues], right: Tensor, name: str, block: int) -> Tensor:
    total = torch.zeros_like(right)
    _, left, other = operands(name)
    for v in experts:
        total[v.expert] = v["s"] * in_blocks(v[left].T, v[other], block)
    return total


def _blocks(evidence: Evidence, base: Change) -> Iterator[Explanation]:
    """Sums over H, I and r are rounded to bf16 after every block."""
    groups: dict[str, tuple[str, ...]] = {"sums over H, I and r": _PRODUCTS}
    groups |= {f"sums over H, I and r in {label(name)}": (name,) for name in _PRODUCTS}
    groups["all sums over H, I and r"] = _PRODUCTS + _LORA_PRODUCTS
    for block in BLOCKS:
        for text, stages in groups.items():
            change = {**base, **{name: _blocked(name, block) for name in stages}}
            said = f"{text} are kept in bf16 from one block of {block} to the next, expected fp32"
            yield from evidence.test(Cause.ACCUMULATION_TYPE, said, change, rank=1 if len(stages) > 1 else 2)


def _blocked(stage: str, block: int) -> Formula:
    """The product of a stage, summed in blocks; forward products are x Wᵀ, backward ones dy W."""
    left, right = operands(stage)[-2:]

    def formula(v: ExpertValues) -> Tensor:
        product = in_blocks(v[left], v[right].T if stage in FORWARD else v[right], block)
        return v["s"] * product if "s" in operands(stage) else product

    return formula


def in_blocks(a: Tensor, b: Tensor, block: int) -> Tensor:
    """a [n, K] times b [K, m], rounded to bf16 after every `block` terms of the sum."""
    total = torch.zeros(len(a), b.shape[1], dtype=a.dtype)
    for i in range(0, a.shape[1], block):
        total = rounded(total + a[:, i : i + block] @ b[i : i + block])
    return total


# ---- results


def _results(evidence: Evidence, right: dict[str, Tensor]) -> Iterator[Explanation]:
    """A result is cut off, rounded twice, rounded to a coarser type, or rounded with other ties."""
    present = tuple(name for name in ALL_TENSORS if name in evidence.actual)
    groups = {
        "every result": present,
        "every result but grad_weights": tuple(name for name in present if name != GRAD_WEIGHTS),
        "the LoRA gradients": tuple(name for name in present if name in GRAD_NAMES),
        **{name: (name,) for name in present},
    }
    for text, names in groups.items():
        if not evidence.worth(names):
            continue
        for how, make in _ROUNDINGS.items():
            # an engine computes a result in fp32 at most
            predicted = {**right, **{name: make(right[name].float()).double() for name in names}}
            said = f"{text} {'are' if text == 'the LoRA gradients' and len(names) > 1 else 'is'} {how}"
            yield evidence.explanation(Cause.ACCUMULATION_TYPE, said, predicted, rank=1 if len(names) > 1 else 2)


def cut_off(value: Tensor, added: int = 0) -> Tensor:
    """[any] fp32 cut off to bf16 after `added` was added to its bits; NaN and Inf stay."""
    kept = (value.contiguous().view(torch.int32) + added) & -(1 << 16)
    return torch.where(torch.isfinite(value), kept.view(torch.float32), value)


def ties_away(value: Tensor) -> Tensor:
    """[any] fp32 rounded to the nearest bf16 number, ties away from zero; NaN and Inf stay."""
    return cut_off(value, 1 << 15)


def to_bits(value: Tensor, bits: int) -> Tensor:
    """[any] fp32 rounded to `bits` significant bits, ties to even; NaN and Inf stay."""
    mantissa, exponent = torch.frexp(value)
    kept = torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent)
    return torch.where(torch.isfinite(value), kept, value)


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut off to bf16, not rounded": cut_off,
    "rounded to bf16 with ties away from zero, not to even": ties_away,
    "rounded twice, first to 11 bits": partial(to_bits, bits=11),
    "rounded to bf16, expected fp32": lambda value: value.bfloat16().float(),
    "rounded to 7 bits": partial(to_bits, bits=7),
    "rounded to 6 bits": partial(to_bits, bits=6),
    "rounded to fp8 (e4m3)": lambda value: value.to(torch.float8_e4m3fn).float(),
    "rounded to fp8 (e5m2)": lambda value: value.to(torch.float8_e5m2).float(),
}


# ---- intermediate values


def _greedy(evidence: Evidence, base: Change, right: dict[str, Tensor]) -> Iterator[Explanation]:
    """Intermediate values are rounded: one is added at a time, as long as it lowers the error by a tenth."""
    candidates: dict[str, tuple[str, Formula]] = {
        label(name): (name, _stage(name)) for name in (*LEAVES, *FORMULAS) if name not in base and name != "s"
    }
    for stage in (OUTPUT, GRAD_WEIGHTS, *GRAD_NAMES):
        for operand in operands(stage)[-2:]:
            candidates[f"{label(operand)} in {stage}"] = (
                stage,
                with_operands(stage, **{operand: _rounded_value(operand)}),
            )
    chosen: dict[str, Formula] = {}
    said: list[str] = []
    left = sum(evidence.left(right).values())
    for _ in range(_MOST):
        best: tuple[float, str, dict[str, Tensor]] | None = None
        for text, (stage, formula) in candidates.items():
            if stage in chosen or text in said:
                continue
            if not evidence.worth(tuple(right), 0.0):
                return
            predicted = {**right, **evidence.layer.changed({**base, **chosen, stage: formula})}
            error = sum(evidence.left(predicted).values())
            if best is None or error < best[0]:
                best = (error, text, predicted)
        if best is None or best[0] > 0.9 * left:
            return
        left = best[0]
        said.append(best[1])
        stage, formula = candidates[best[1]]
        chosen[stage] = formula
        text = f"{', '.join(said)} {'is' if len(said) == 1 else 'are'} rounded to bf16 on the way"
        yield evidence.explanation(Cause.ACCUMULATION_TYPE, text, best[2], rank=2)
