"""Hypotheses about routing: other ids, permuted experts, one wrong expert, slot or token, an expert given twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import NEAR, Evidence, Explanation, Tensors
from ktverify.diagnose.formulas import MATRICES, Change, ExpertValues, LayerValues, add_up, recomputed
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import BACKWARD_TENSORS, BASE_NAMES, GRAD_NAMES, GRAD_WEIGHTS, OUTPUT

_MANY = 16  # up to this many experts, every pair is tried


def ids_changed(evidence: Evidence) -> Iterator[Explanation]:
    """The engine uses other ids: shifted by one, -1 as an expert, or an expert given twice counted once."""
    ids = evidence.inputs.expert_ids
    for cause, text, other in _other_ids(evidence.inputs):
        if torch.equal(other, ids) or not evidence.worth(tuple(evidence.actual)):
            continue
        predicted = LayerValues.of(replace(evidence.inputs, expert_ids=other)).tensors
        yield from _both_halves(evidence, cause, text, predicted)


def _other_ids(inputs: Inputs) -> Iterator[tuple[Cause, str, Tensor]]:
    """(cause, text, ids [T, k]) of every hypothesis about ids."""
    ids, count = inputs.expert_ids, inputs.case.num_experts
    taken = ids >= 0
    for text, moved in (
        ("expert e + 1 is used for expert e", (ids + 1) % count),
        ("expert e - 1 is used for expert e", (ids - 1) % count),
        ("expert min(e + 1, E - 1) is used for expert e", (ids + 1).clamp(max=count - 1)),
        ("expert max(e - 1, 0) is used for expert e", (ids - 1).clamp(min=0)),
        ("expert E - 1 - e is used for expert e", count - 1 - ids),
    ):
        yield Cause.EXPERT_PERMUTATION, text, torch.where(taken, moved, ids)
    inverse = torch.argsort(inputs.physical_map)
    for text, order in (("physical_map", inputs.physical_map), ("the inverse of physical_map", inverse)):
        yield Cause.EXPERT_PERMUTATION, f"ids are put through {text}", torch.where(taken, order[ids.clamp(min=0)], ids)
    yield Cause.IDS, f"id -1 is taken for expert {count - 1}", torch.where(taken, ids, count - 1)
    yield Cause.IDS, "id -1 is taken for expert 0", torch.where(taken, ids, 0)
    first = _first_naming(ids)
    yield Cause.IDS, "an expert that a token names twice counts once, the first time", torch.where(first, ids, -1)
    last = _first_naming(ids.flip(1)).flip(1)
    yield Cause.IDS, "an expert that a token names twice counts once, the last time", torch.where(last, ids, -1)
    for expert in (0, count - 1):
        yield Cause.EXPERT_WRONG, f"expert {expert} of {count} is left out", torch.where(ids == expert, -1, ids)
    yield Cause.IDS, "the ids of the next token are used", ids.roll(-1, 0)
    yield Cause.IDS, "the ids of the token before are used", ids.roll(1, 0)
    yield Cause.SLOT_WRONG, "slots have the weights of the next slot's expert", ids.roll(1, 1)
    yield Cause.SLOT_WRONG, "slots have the weights of the expert in the slot before", ids.roll(-1, 1)
    yield Cause.SLOT_WRONG, "the experts of a token are in reverse order", ids.flip(1)


def _first_naming(ids: Tensor) -> Tensor:
    """[T, k] bool: no earlier slot of the token has the same expert."""
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    return ~(same & earlier).any(2)


def _both_halves(evidence: Evidence, cause: Cause, text: str, predicted: Tensors) -> Iterator[Explanation]:
    yield evidence.explanation(cause, text, predicted)
    yield evidence.explanation(cause, f"{text}, in the forward", {OUTPUT: predicted[OUTPUT]})
    yield evidence.explanation(cause, f"{text}, in the backward", {name: predicted[name] for name in BACKWARD_TENSORS})


# ---- permuted experts


def permuted(evidence: Evidence) -> Iterator[Explanation]:
    """Experts with the base weights or LoRA of others: physical_map ignored or inverted, or any permutation."""
    inputs = evidence.inputs
    count = inputs.case.num_experts
    identity = torch.arange(count)
    orders = {
        "physical_map is not followed": inputs.physical_map,
        "physical_map is followed backwards": torch.argsort(inputs.physical_map),
        "physical_map is followed twice": inputs.physical_map[inputs.physical_map],
        "expert e has the weights of e + 1": (identity + 1) % count,
        "expert e has the weights of e - 1": (identity - 1) % count,
    }
    found = _matched(evidence)
    moved = ", ".join(f"{e} has {o}'s" for e, o in enumerate(found.tolist()) if e != o)
    orders[f"experts are permuted: {moved}"] = found
    seen: list[Tensor] = [identity]
    for text, order in orders.items():
        if not any(torch.equal(order, other) for other in seen):
            seen.append(order)
            yield from _with_order(evidence, text, order)


def _with_order(evidence: Evidence, text: str, order: Tensor) -> Iterator[Explanation]:
    inputs = evidence.inputs
    base = {name: getattr(inputs, name)[order] for name in BASE_NAMES}
    lora = {name: tensor[order] for name, tensor in inputs.lora.items()}
    for what, changed in (
        ("base and LoRA", replace(inputs, **base, lora=lora)),
        ("base weights", replace(inputs, **base)),
        ("LoRA", replace(inputs, lora=lora)),
    ):
        if evidence.worth(tuple(evidence.actual)):
            predicted = LayerValues.of(changed).tensors
            yield from _both_halves(evidence, Cause.EXPERT_PERMUTATION, f"{text} ({what})", predicted)
    scattered = {name: evidence.right[name][order] for name in GRAD_NAMES if name in evidence.actual}
    said = f"LoRA gradients are stored at other experts: {text}"
    yield evidence.explanation(Cause.EXPERT_PERMUTATION, said, scattered)


def _matched(evidence: Evidence) -> Tensor:
    """[E] for each expert, the expert whose weights explain its rows of the output best."""
    experts = evidence.layer.experts
    order = torch.arange(evidence.case.num_experts)
    if not 2 <= len(experts) <= _MANY or not evidence.worth((OUTPUT,), 0.05):
        return order
    apart = evidence.actual[OUTPUT] - evidence.right[OUTPUT]
    for v in experts:
        gains = []
        for other in experts:
            change: Change = {name: lambda _, n=name, o=other: o[n] for name in MATRICES}  # type: ignore[misc]
            moved = recomputed(v, change)[OUTPUT] - v[OUTPUT]
            gains.append(float(2 * (moved * apart[v.rows]).sum() - moved.square().sum()))
        best = max(range(len(experts)), key=gains.__getitem__)
        if gains[best] > 0.3 * float(apart[v.rows].square().sum()):
            order[v.expert] = experts[best].expert
    return order


# ---- one expert, one slot, one token


def one_expert(evidence: Evidence) -> Iterator[Explanation]:
    """Each expert's share with a factor of its own: 0 where it is missing."""
    experts = [v.expert for v in evidence.layer.experts]
    if 2 <= len(experts) <= 2 * _MANY:
        yield from _factors(evidence, "expert", experts, lambda v, e: torch.full_like(v.slots, v.expert) == e)


def one_slot(evidence: Evidence) -> Iterator[Explanation]:
    """Each slot's share with a factor of its own."""
    slots = list(range(evidence.case.top_k))
    if len(slots) > 1:
        yield from _factors(evidence, "slot", slots, lambda v, j: v.slots == j)


def one_token(evidence: Evidence) -> Iterator[Explanation]:
    """The shares of the first and the last tokens with factors of their own."""
    rows = evidence.case.qlen
    if rows > 2:
        tokens = [0, 1, rows - 2, rows - 1] if rows > 3 else [0, rows - 1]
        yield from _factors(evidence, "token", tokens, lambda v, t: v.rows == t)


def _factors(
    evidence: Evidence, what: str, places: Sequence[int], mine: Callable[[ExpertValues, int], Tensor]
) -> Iterator[Explanation]:
    """All tensors are linear in the routing weight except grad_weights, whose elements are masked instead."""
    cause = {"expert": Cause.EXPERT_WRONG, "slot": Cause.SLOT_WRONG, "token": Cause.TOKEN_TAIL}[what]
    parts = []
    for place in places:
        change: Change = {"w": lambda v, p=place: v["w"] * mine(v, p).unsqueeze(1)}  # type: ignore[misc]
        cut = [replace(v, of={GRAD_WEIGHTS: v[GRAD_WEIGHTS] * mine(v, place)}) for v in evidence.layer.experts]
        mine_only = {GRAD_WEIGHTS: add_up(evidence.inputs, cut, GRAD_WEIGHTS)}
        parts.append({**evidence.layer.changed(change), **mine_only})
    halves = (("", tuple(evidence.actual)), (" of the output", (OUTPUT,)), (" of the gradients", BACKWARD_TENSORS))
    for where, names in halves:
        fitted = evidence.fit_shares(parts, names)
        if fitted is None or len(fitted[0]) > max(1, len(places) // 2):
            continue
        said = ", ".join(
            f"{what} {places[i]}'s share{where} " + ("is missing" if abs(f) < NEAR else f"has the factor {f:.2f}")
            for i, f in fitted[0].items()
        )
        yield evidence.explanation(cause, said, fitted[1], rank=1 if len(fitted[0]) == 1 else 3)


def rows_cut(evidence: Evidence) -> Iterator[Explanation]:
    """Rows of an expert beyond a limit are left out, or compute with its first rows."""
    case = evidence.case
    fair = case.qlen * case.top_k / case.num_experts
    rooms = {size: str(size) for size in (8, 16, 32, 64, 128, 256)}
    for factor in (1.0, 1.25, 1.5, 2.0):
        rooms[max(1, int(factor * fair))] = f"{max(1, int(factor * fair))} ({factor:g} times its share)"
    most = max((len(v.rows) for v in evidence.layer.experts), default=0)
    for room, said in rooms.items():
        if room >= most:
            continue
        dropped: Change = {
            "w": lambda v, n=room: v["w"] * _below(v, n).unsqueeze(1),  # type: ignore[misc]
            "grad_weights": lambda v, n=room: (v["d_out"] * v["y"]).sum(1) * _below(v, n),  # type: ignore[misc]
        }
        yield from evidence.test(Cause.TOKEN_TAIL, f"rows of an expert beyond {said} are left out", dropped)
        again: Change = {"x": lambda v, n=room: v["x"][torch.arange(len(v.rows)) % n]}  # type: ignore[misc]
        said = f"rows of an expert beyond {said} compute with the first ones"
        yield from evidence.test(Cause.TOKEN_TAIL, said, again)


def _below(v: ExpertValues, room: int) -> Tensor:
    return (torch.arange(len(v.rows)) < room).double()


def where_it_is(evidence: Evidence) -> Iterator[Explanation]:
    """A hint where no formula explains the error: nearly all of it is in one expert."""
    for name in ("grad_gate_lora_b", "grad_up_lora_b", "grad_down_lora_a", "grad_down_lora_b", "grad_gate_lora_a"):
        if name not in evidence.failing:
            continue
        apart = (evidence.actual[name] - evidence.right[name]).nan_to_num().square().flatten(1).sum(1)
        worst = int(apart.argmax())
        share = float(apart[worst] / apart.sum()) if float(apart.sum()) > 0 else 0.0
        if share > 0.9 and len(evidence.layer.experts) > 2:
            said = f"expert {worst} alone is wrong ({share:.0%} of the error of {name})"
            yield Explanation(Cause.EXPERT_WRONG, said, 0.9 * share, (1 - 0.9 * share) * evidence.error, rank=4)
            return
