"""Hypotheses of a type: a sum kept in bf16, a value rounded on its way, parameters or results cast.

They are tried on top of the roundings that every engine may have (docs/contract.md: operands are bf16), so that
what is left is the rounding that should not be there; and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Finding, Situation
from ktverify.diagnose.formulas import FORMULAS, LEAVES, Change, Formula, Values, add_up, label, operands, recomputed
from ktverify.spec.names import ALL_TENSORS, GRAD_INPUT, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT

LOW = torch.bfloat16
BLOCKS = (16, 32, 64, 128, 256)
_MOST = 5  # roundings that are put together
# left, right and whether right is transposed, of every product of two matrices whose sum runs over H, I or r
_PRODUCTS: dict[str, tuple[str, str, bool]] = {
    "x_ga": ("x", "ga", True),
    "x_ua": ("x", "ua", True),
    "g_base": ("x", "gate", True),
    "u_base": ("x", "up", True),
    "h_da": ("h", "da", True),
    "y_base": ("h", "down", True),
    "dy_db": ("dy", "db", False),
    "dh_base": ("dy", "down", False),
    "dg_gb": ("dg", "gb", False),
    "du_ub": ("du", "ub", False),
    "dx_gate": ("dg", "gate", False),
    "dx_up": ("du", "up", False),
}


def rounded(value: Tensor, dtype: torch.dtype = LOW) -> Tensor:
    """`value` rounded to a type and back to fp64."""
    return value.to(dtype).to(value.dtype)


def types(situation: Situation) -> Iterator[Finding]:
    """Sums in bf16, values rounded where they should not be, results rounded in another way."""
    plain: Change = {}
    for base in (_OPERANDS, plain):
        experts = [recomputed(v, base) for v in situation.layer.experts] if base else situation.layer.experts
        right = {name: add_up(situation.inputs, experts, name) for name in situation.actual}
        yield from _sums(situation, experts, right)
        yield from _blocks(situation, base)
        yield from _results(situation, right)
        yield from _greedy(situation, base, right)


def _stage(name: str) -> Formula:
    """A leaf or stage, rounded."""
    if name in LEAVES:
        return lambda v: rounded(v[name])
    return lambda v: rounded(FORMULAS[name](v))


_OPERANDS: dict[str, Formula] = {name: _stage(name) for name in ("h", "dy", "dg", "du")}


# ---- sums


def _sums(situation: Situation, experts: list[Values], right: dict[str, Tensor]) -> Iterator[Finding]:
    for name, what in ((OUTPUT, "slots"), (GRAD_INPUT, "experts")):
        if situation.worth((name,), 0.3):
            for order, total in _running(experts, right[name], name, situation.case.top_k):
                said = f"the sum over {what} in {name} is kept in bf16, expected fp32"
                yield situation.finding(Cause.ACCUMULATION_TYPE, said, {**right, name: total}, evidence=(order,))
    names = tuple(name for name in GRAD_NAMES if name in situation.actual)
    if situation.worth(names, 0.3):
        for block in (1, 2, 4, 8, *BLOCKS):
            predicted = {name: _over_tokens(experts, right[name], name, block) for name in names}
            step = "" if block == 1 else f" ({block} at a time)"
            said = f"the sum over tokens{step} in the LoRA gradients is kept in bf16, expected fp32"
            yield situation.finding(Cause.ACCUMULATION_TYPE, said, {**right, **predicted})


def _running(experts: list[Values], right: Tensor, name: str, slots: int) -> Iterator[tuple[str, Tensor]]:
    """Rounded after every expert, after every slot, and with every term rounded before."""
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


def _over_tokens(experts: list[Values], right: Tensor, name: str, block: int) -> Tensor:
    total = torch.zeros_like(right)
    _, left, other = operands(name)
    for v in experts:
        a, b = v[left], v[other]
        part = torch.zeros_like(total[v.expert])
        for i in range(0, len(a), block):
            part = rounded(part + a[i : i + block].T @ b[i : i + block])
        total[v.expert] = v["s"] * part
    return total


def _blocks(situation: Situation, base: Change) -> Iterator[Finding]:
    """Sums over H, I and r that go through bf16 from one block to the next."""
    for block in BLOCKS:
        for where, stages in (("", tuple(_PRODUCTS)), *((f" in {label(name)}", (name,)) for name in _PRODUCTS)):
            change = {**base, **{name: _blocked(name, block) for name in stages}}
            said = f"sums over H, I and r{where} are kept in bf16 from one block of {block} to the next, expected fp32"
            rank = 1 if len(stages) > 1 else 2
            yield from situation.tried(Cause.ACCUMULATION_TYPE, said, change, rank=rank)
        lora = _lora_blocks(block)
        said = f"all sums over H, I and r are kept in bf16 from one block of {block} to the next, expected fp32"
        change = {**base, **{name: _blocked(name, block) for name in _PRODUCTS}, **lora}
        yield from situation.tried(Cause.ACCUMULATION_TYPE, said, change)


def _blocked(name: str, block: int) -> Formula:
    left, right, turned = _PRODUCTS[name]
    return lambda v: _product(v[left], v[right].T if turned else v[right], block)


def _product(a: Tensor, b: Tensor, block: int) -> Tensor:
    total = torch.zeros(len(a), b.shape[1], dtype=a.dtype)
    for i in range(0, a.shape[1], block):
        total = rounded(total + a[:, i : i + block] @ b[i : i + block])
    return total


def _lora_blocks(block: int) -> dict[str, Formula]:
    """The second product of each LoRA part, over r."""
    parts = {
        "g_lora": ("x_ga", "gb", True),
        "u_lora": ("x_ua", "ub", True),
        "y_lora": ("h_da", "db", True),
        "dh_lora": ("dy_db", "da", False),
        "dx_gate_lora": ("dg_gb", "ga", False),
        "dx_up_lora": ("du_ub", "ua", False),
    }

    def part(left: str, right: str, turned: bool) -> Formula:
        return lambda v: v["s"] * _product(v[left], v[right].T if turned else v[right], block)

    return {name: part(*which) for name, which in parts.items()}


# ---- results


def _results(situation: Situation, right: dict[str, Tensor]) -> Iterator[Finding]:
    """A result cut off, rounded twice, to a coarser type, or in another way than to even."""
    single = {name: (name,) for name in ALL_TENSORS if name in situation.actual}
    groups: Mapping[str, tuple[str, ...]] = {
        "every result": tuple(situation.actual),
        "every result but grad_weights": tuple(name for name in situation.actual if name != GRAD_WEIGHTS),
        "the LoRA gradients": tuple(name for name in GRAD_NAMES if name in situation.actual),
        **single,
    }
    for text, names in groups.items():
        if not situation.worth(names):
            continue
        for how, make in _ROUNDINGS.items():
            # what ends as bf16 may first be fp32, never more
            predicted = {**right, **{name: make(right[name].float()).double() for name in names}}
            verb = "is" if len(names) == 1 or text.startswith("every") else "are"
            said = f"{text} {verb} {how}"
            yield situation.finding(Cause.ACCUMULATION_TYPE, said, predicted, rank=1 if len(names) > 1 else 2)


def _cut_off(value: Tensor) -> Tensor:
    """[any] fp32 with its lower 16 bits zero: towards zero to bf16."""
    return (value.contiguous().view(torch.int32) & -65536).view(torch.float32)


def _ties_away(value: Tensor) -> Tensor:
    """[any] fp32 to the nearest bf16 number, half way away from zero."""
    raised = (value.contiguous().view(torch.int32) + (1 << 15)) & -65536
    return torch.where(torch.isfinite(value), raised.view(torch.float32), value)


def _to_bits(bits: int) -> Callable[[Tensor], Tensor]:
    def to_bits(value: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(value)
        kept = torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent)
        return torch.where(torch.isfinite(value), kept, value)

    return to_bits


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut off to bf16, not rounded": _cut_off,
    "rounded to bf16 with ties away from zero, not to even": _ties_away,
    "rounded twice, first to 11 bits": _to_bits(11),
    "rounded to bf16, expected fp32": lambda value: value.bfloat16().float(),
    "rounded to 7 bits": _to_bits(7),
    "rounded to 6 bits": _to_bits(6),
    "rounded to fp8 (e4m3)": lambda value: value.to(torch.float8_e4m3fn).float(),
    "rounded to fp8 (e5m2)": lambda value: value.to(torch.float8_e5m2).float(),
}


# ---- values on the way


def _greedy(situation: Situation, base: Change, right: dict[str, Tensor]) -> Iterator[Finding]:
    """Values rounded on their way, one after the other as long as each takes a tenth of what is left."""
    candidates: dict[str, tuple[str, Formula]] = {
        label(name): (name, _stage(name)) for name in (*LEAVES, *FORMULAS) if name not in base and name != "s"
    }
    for stage in (OUTPUT, GRAD_WEIGHTS, *GRAD_NAMES):
        for operand in operands(stage)[-2:]:
            candidates[f"{label(operand)} in {stage}"] = (stage, _rounded_operand(stage, operand))
    chosen: dict[str, Formula] = {}
    said: list[str] = []
    left = sum(situation.left(right).values())
    for _ in range(_MOST):
        best: tuple[float, str, dict[str, Tensor]] | None = None
        for text, (stage, formula) in candidates.items():
            if stage in chosen or text in said:
                continue
            if not situation.worth(tuple(right), 0.0):
                return
            predicted = {**right, **situation.layer.changed({**base, **chosen, stage: formula})}
            error = sum(situation.left(predicted).values())
            if best is None or error < best[0]:
                best = (error, text, predicted)
        if best is None or best[0] > 0.9 * left:
            return
        left = best[0]
        said.append(best[1])
        stage, formula = candidates[best[1]]
        chosen[stage] = formula
        text = f"{', '.join(said)} {'is' if len(said) == 1 else 'are'} rounded to bf16 on the way"
        yield situation.finding(Cause.ACCUMULATION_TYPE, text, best[2], rank=2)


def _rounded_operand(stage: str, operand: str) -> Formula:
    def formula(v: Values) -> Tensor:
        return FORMULAS[stage](v.with_values({**v.of, operand: rounded(v[operand])}))

    return formula
