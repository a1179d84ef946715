"""Hypotheses about routing: ids moved, experts permuted, one expert, slot or token wrong, experts named twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ktverify.checks.causes import Cause
from ktverify.diagnose.evidence import Finding, Situation, Tensors
from ktverify.diagnose.formulas import Change, Layer, Values, add_up
from ktverify.spec.inputs import Inputs
from ktverify.spec.names import BACKWARD_TENSORS, OUTPUT

_MANY = 16  # experts up to which every pair is matched
_NEAR = 0.03  # a fitted factor this near to 1 is 1


def ids_changed(situation: Situation) -> Iterator[Finding]:
    """The ids are not those that were given: moved by one, -1 taken for an expert, a second naming not counted."""
    ids = situation.inputs.expert_ids
    for cause, text, other in _other_ids(situation.inputs):
        if torch.equal(other, ids) or not situation.worth(tuple(situation.actual)):
            continue
        predicted = Layer.of(replace(situation.inputs, expert_ids=other)).tensors
        yield from _both_halves(situation, cause, text, predicted)


def _other_ids(inputs: Inputs) -> Iterator[tuple[Cause, str, Tensor]]:
    ids, count = inputs.expert_ids, inputs.case.num_experts
    taken = ids >= 0
    none = torch.full_like(ids, -1)
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
    yield Cause.IDS, "an expert that a token names twice counts once, the first time", torch.where(first, ids, none)
    last = _first_naming(ids.flip(1)).flip(1)
    yield Cause.IDS, "an expert that a token names twice counts once, the last time", torch.where(last, ids, none)
    for expert in (0, count - 1):
        without = torch.where(ids == expert, none, ids)
        yield Cause.EXPERT_WRONG, f"expert {expert} of {count} is left out", without
    for text, moved in (
        ("the ids of the next token are used", ids.roll(-1, 0)),
        ("the ids of the token before are used", ids.roll(1, 0)),
    ):
        yield Cause.IDS, text, moved
    for text, moved in (
        ("slots have the weights of the next slot's expert", ids.roll(1, 1)),
        ("slots have the weights of the expert in the slot before", ids.roll(-1, 1)),
        ("the experts of a token are in reverse order", ids.flip(1)),
    ):
        yield Cause.SLOT_WRONG, text, moved


def _first_naming(ids: Tensor) -> Tensor:
    """[T, k] bool: no slot before this one names the same expert."""
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    return ~(same & earlier).any(2)


def _both_halves(situation: Situation, cause: Cause, text: str, predicted: Tensors) -> Iterator[Finding]:
    yield situation.finding(cause, text, predicted)
    yield situation.finding(cause, f"{text}, in the forward", {OUTPUT: predicted[OUTPUT]})
    yield situation.finding(cause, f"{text}, in the backward", {name: predicted[name] for name in BACKWARD_TENSORS})


# ---- permutations of what the experts hold


def permuted(situation: Situation) -> Iterator[Finding]:
    """Experts with each other's base weights or LoRA: physical_map ignored or inverted, or any permutation."""
    inputs = situation.inputs
    count = inputs.case.num_experts
    identity = torch.arange(count)
    orders = {
        "physical_map is not followed": inputs.physical_map,
        "physical_map is followed backwards": torch.argsort(inputs.physical_map),
        "physical_map is followed twice": inputs.physical_map[inputs.physical_map],
        "expert e has the weights of e + 1": (identity + 1) % count,
        "expert e has the weights of e - 1": (identity - 1) % count,
    }
    seen: list[Tensor] = [identity]
    for text, order in orders.items():
        if any(torch.equal(order, other) for other in seen):
            continue
        seen.append(order)
        yield from _with_order(situation, text, order)
    found = _matched(situation)
    if found is not None and not any(torch.equal(found, other) for other in seen):
        moved = ", ".join(f"{e} has {int(o)}'s" for e, o in enumerate(found) if e != int(o))
        yield from _with_order(situation, f"experts are permuted: {moved}", found)


def _with_order(situation: Situation, text: str, order: Tensor) -> Iterator[Finding]:
    inputs = situation.inputs
    # an expert that no token reaches has no base weights, and its LoRA would be seen without them
    base = {name: getattr(inputs, name)[order] for name in ("gate_proj", "up_proj", "down_proj")}
    lora = {name: tensor[order] for name, tensor in inputs.lora.items()}
    for what, changed in (
        ("base and LoRA", replace(inputs, **base, lora=lora)),
        ("base weights", replace(inputs, **base)),
        ("LoRA", replace(inputs, lora=lora)),
    ):
        if situation.worth(tuple(situation.actual)):
            predicted = Layer.of(changed).tensors
            yield from _both_halves(situation, Cause.EXPERT_PERMUTATION, f"{text} ({what})", predicted)
    scattered = {
        name: situation.right[name][order] for name in situation.actual if name.startswith("grad_") and "lora" in name
    }
    said = f"LoRA gradients are stored at other experts: {text}"
    yield situation.finding(Cause.EXPERT_PERMUTATION, said, scattered)


def _matched(situation: Situation) -> Tensor | None:
    """[E] the expert whose weights each expert's rows seem to meet, from the output; None where nothing is gained."""
    inputs = situation.inputs
    experts = situation.layer.experts
    if not 2 <= len(experts) <= _MANY or not situation.worth((OUTPUT,), 0.05):
        return None
    apart = situation.actual[OUTPUT] - situation.right[OUTPUT]
    order = torch.arange(inputs.case.num_experts)
    for v in experts:
        gains = []
        for other in experts:
            swapped = _with_weights_of(v, other)
            moved = swapped[OUTPUT] - v[OUTPUT]
            target = apart[v.rows]
            gains.append(float(2 * (moved * target).sum() - moved.square().sum()))
        best = max(range(len(experts)), key=gains.__getitem__)
        if gains[best] > 0.3 * float(apart[v.rows].square().sum()):
            order[v.expert] = experts[best].expert
    return order if not torch.equal(order, torch.arange(len(order))) else None


def _with_weights_of(v: Values, other: Values) -> Values:
    from ktverify.diagnose.formulas import recomputed

    change: Change = {
        name: (lambda _, n=name: other[n])  # type: ignore[misc]
        for name in ("gate", "up", "down", "ga", "gb", "ua", "ub", "da", "db")
    }
    return recomputed(v, change)


# ---- one expert, one slot, one token


def one_expert(situation: Situation) -> Iterator[Finding]:
    """Each expert's share of everything with a factor of its own, by least squares: 0 where one is missing."""
    experts = [v.expert for v in situation.layer.experts]
    if 2 <= len(experts) <= 2 * _MANY:
        yield from _factors(situation, "expert", experts, lambda v, e: torch.full_like(v.slots, v.expert) == e)


def one_slot(situation: Situation) -> Iterator[Finding]:
    """Each slot's share of everything with a factor of its own, by least squares."""
    slots = list(range(situation.case.top_k))
    if len(slots) > 1:
        yield from _factors(situation, "slot", slots, lambda v, j: v.slots == j)


def one_token(situation: Situation) -> Iterator[Finding]:
    """The first and the last token's share with factors of their own."""
    rows = situation.case.qlen
    if rows > 2:
        tokens = [0, 1, rows - 2, rows - 1] if rows > 3 else [0, rows - 1]
        yield from _factors(situation, "token", tokens, lambda v, t: v.rows == t)


def _factors(
    situation: Situation, what: str, places: Sequence[int], mine: Callable[[Values, int], Tensor]
) -> Iterator[Finding]:
    """Everything is linear in the routing weight but grad_weights, which is left as it is, or cut like the rest."""
    cause = {"expert": Cause.EXPERT_WRONG, "slot": Cause.SLOT_WRONG, "token": Cause.TOKEN_TAIL}[what]
    parts = []
    for place in places:
        change: Change = {"w": lambda v, p=place: v["w"] * mine(v, p).unsqueeze(1)}  # type: ignore[misc]
        part = situation.layer.changed(change)
        part["grad_weights"] = add_up(
            situation.inputs, [_cut(v, mine(v, place)) for v in situation.layer.experts], "grad_weights"
        )
        parts.append(part)
    halves = (("", tuple(situation.actual)), (" of the output", (OUTPUT,)), (" of the gradients", BACKWARD_TENSORS))
    for where, names in halves:
        chosen = [{name: part[name] for name in names if name in part} for part in parts]
        if not situation.worth(names):
            continue
        moved = situation.fit(chosen)
        if moved is None:
            continue
        odd = [i for i, value in enumerate(moved.tolist()) if abs(value) > _NEAR]
        if not odd or len(odd) > max(1, len(places) // 2):
            continue
        predicted = {
            name: situation.right[name] + torch.stack([float(moved[i]) * chosen[i][name] for i in odd]).sum(0)
            for name in chosen[0]
        }
        factors = [(places[i], 1 + float(moved[i])) for i in odd]
        said = ", ".join(
            f"{what} {place}'s share{where} is missing"
            if abs(f) < _NEAR
            else f"{what} {place}'s share{where} has the factor {f:.2f}"
            for place, f in factors
        )
        yield situation.finding(cause, said, predicted, rank=1 if len(odd) == 1 else 3)


def _cut(v: Values, mine: Tensor) -> Values:
    return v.with_values({**v.of, "grad_weights": v["grad_weights"] * mine})


def rows_cut(situation: Situation) -> Iterator[Finding]:
    """An expert takes only so many rows, or begins again with the first ones."""
    case = situation.case
    fair = case.qlen * case.top_k / case.num_experts
    rooms = {size: str(size) for size in (8, 16, 32, 64, 128, 256)}
    for factor in (1.0, 1.25, 1.5, 2.0):
        rooms[max(1, int(factor * fair))] = f"{max(1, int(factor * fair))} ({factor:g} times its share)"
    most = max((len(v.rows) for v in situation.layer.experts), default=0)
    for room, said in rooms.items():
        if room >= most:
            continue
        dropped: Change = {
            "w": lambda v, n=room: v["w"] * _below(v, n).unsqueeze(1),  # type: ignore[misc]
            "grad_weights": lambda v, n=room: (v["d_out"] * v["y"]).sum(1) * _below(v, n),  # type: ignore[misc]
        }
        yield from situation.tried(Cause.TOKEN_TAIL, f"rows of an expert beyond {said} are left out", dropped)
        again: Change = {"x": lambda v, n=room: v["x"][torch.arange(len(v.rows)) % n]}  # type: ignore[misc]
        yield from situation.tried(
            Cause.TOKEN_TAIL, f"rows of an expert beyond {said} compute with the first ones", again
        )


def _below(v: Values, room: int) -> Tensor:
    return (torch.arange(len(v.rows)) < room).double()


def where_it_is(situation: Situation) -> Iterator[Finding]:
    """What narrows the search where no formula explains the error: it stands in one expert, or in one slot."""
    for name in ("grad_gate_lora_b", "grad_up_lora_b", "grad_down_lora_a", "grad_down_lora_b", "grad_gate_lora_a"):
        if name not in situation.failing:
            continue
        apart = (situation.actual[name] - situation.right[name]).nan_to_num().square().flatten(1).sum(1)
        worst = int(apart.argmax())
        share = float(apart[worst] / apart.sum()) if float(apart.sum()) > 0 else 0.0
        if share > 0.9 and len(situation.layer.experts) > 2:
            left = (1 - 0.9 * share) * situation.error
            yield Finding(
                Cause.EXPERT_WRONG,
                f"expert {worst} alone is wrong ({share:.0%} of the error of {name})",
                0.9 * share,
                left,
                rank=4,
            )
            return
