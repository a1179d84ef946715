"""Experts divided among processes: two to four ranks give the results of one layer, wherever tokens and experts are.

ktverify/engines/expert_parallel.py divides; the engine computes each rank's experts, see rank_processes.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktverify.checks.altered_inputs import changed
from ktverify.checks.causes import Cause
from ktverify.checks.check import Function, Where, check
from ktverify.checks.judging import NUMBERS, judged
from ktverify.checks.rank_processes import MOST, DividedCall, Rank, RankProcesses, Tensors
from ktverify.checks.target import Target
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import ALL_TENSORS, LORA_NAMES

# seven experts are no multiple of two, three or four ranks
CASE = Case.parse("E=7,k=3,H=96,I=64,T=32,r=8,alpha=24")
SIZES = (2, 3, MOST)
# whose token's row is whose, of four ranks, and what the experts of the tokens are
SPREAD = (3, 5, 2, 4)
_SHAPE = (CASE.qlen, CASE.top_k)


def _alone(expert: int) -> np.ndarray[Any, Any]:
    return np.full(_SHAPE, expert, np.int64)


def _half_masked() -> np.ndarray[Any, Any]:
    """Every second slot, and all slots of the first tokens, are -1."""
    found: np.ndarray[Any, Any] = make_inputs(CASE).expert_ids.numpy().copy()
    found.reshape(-1)[::2] = found[:4] = -1
    return found


def _duplicates() -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.arange(_SHAPE[0] * _SHAPE[1], dtype=np.int64).reshape(_SHAPE)
    return found // 2 * 3 % CASE.num_experts


ROUTINGS: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray[Any, Any] | None]]] = {
    "uneven": ((1, 9, 3, 2), lambda: None),
    "empty_rank": ((0, 2, 0, 1), lambda: None),
    "one_rank": (SPREAD, lambda: _alone(0)),
    "last_expert": (SPREAD, lambda: _alone(CASE.num_experts - 1)),
    "duplicates": (SPREAD, _duplicates),
    "masked": (SPREAD, _half_masked),
}


def _divided(contract: str, **more: Any) -> Callable[[Function], Function]:
    settings: dict[str, Any] = {"cause": Cause.DIVIDED, "where": Where.OWN_CHOICE, "fresh_process": True, **more}
    return check("expert_parallel", contract, family="expert_parallel", **settings)


def _inputs(ids: np.ndarray[Any, Any] | None = None) -> Inputs:
    found = make_inputs(CASE, expert_ids=ids)
    return changed(found, weights=found.weights.masked_fill(found.expert_ids < 0, torch.nan))


def _parts(shares: tuple[int, ...], size: int) -> tuple[slice, ...]:
    """Tokens of each of `size` ranks, in the proportion of `shares`; all of one rank."""
    given = shares[:size] if size > 1 else (1,)
    edges = [sum(given[:rank]) * CASE.qlen // sum(given) for rank in range(len(given) + 1)]
    return tuple(slice(first, last) for first, last in itertools.pairwise(edges))


def _call(size: int, inputs: Inputs, shares: tuple[int, ...] = SPREAD, *steps: Tensors | None) -> DividedCall:
    return DividedCall(size, inputs, _parts(shares, size), steps or (None,))


@_divided(
    "With every number of ranks, all results keep the budget of a layer that has all experts.",
    gates=(*NUMBERS, "form"),
    variants={f"/{size}": {"size": size} for size in SIZES},
)
def check_ranks(target: Target, size: int) -> None:
    """All results beside the oracle, of ranks with unequal numbers of tokens and of experts."""
    inputs = _inputs()
    with RankProcesses(target, size) as ranks:
        (found,) = ranks.call(_call(size, inputs))
    judged(target, f"{size} ranks", CASE, found, inputs)


@_divided(
    "A rank without a token, without a slot at its experts, or with all slots is like any other.",
    gates=(*NUMBERS, "form"),
    variants={f"/{routing}": {"routing": routing} for routing in ROUTINGS},
)
def check_routings(target: Target, routing: str) -> None:
    """All results beside the oracle, with each number of ranks."""
    shares, ids = ROUTINGS[routing]
    inputs = _inputs(ids())
    # the routing leaves experts idle on purpose
    lenient = replace(target, gates_off=target.gates_off | {"trust"})
    with RankProcesses(target) as ranks:
        for size in SIZES:
            (found,) = ranks.call(_call(size, inputs, shares))
            judged(lenient, f"{routing}, {size} ranks", CASE, found, inputs)


@_divided("Slots of −1 do not travel: with these alone all results are exactly 0.", gates=("stray",))
def check_no_slot(target: Target) -> None:
    """Zeros, from weights that are NaN, with each number of ranks."""
    inputs = _inputs(_alone(-1))
    with RankProcesses(target) as ranks:
        for size in SIZES:
            (found,) = ranks.call(_call(size, inputs))
            odd = [name for name in ALL_TENSORS if bool((found[name] != 0).any())]
            target.expect(not odd, f"{size} ranks, no slot: {', '.join(odd)} must be zero", "stray")


@_divided("Routing weights stay on the rank of the token, and are multiplied in once.", gates=(*NUMBERS, "form"))
def check_scaling(target: Target) -> None:
    """All results beside the oracle, with routing weights that a model's factor of 2.5 has scaled, and s = 3."""
    inputs = _inputs()
    scaled = changed(inputs, weights=inputs.weights * 2.5)
    with RankProcesses(target, 3) as ranks:
        (found,) = ranks.call(_call(3, scaled))
    judged(target, "routing weights times 2.5", CASE, found, scaled)


@_divided("The same call has the same bits, and a step reaches the experts of every rank.")
def check_repeats(target: Target) -> None:
    """Twice on the same layers, after a step to other LoRA and one back, and on new layers."""
    inputs, other = _inputs(), make_inputs(CASE.with_seed(6)).lora
    with RankProcesses(target, 3) as ranks:
        first, again, stepped, back = ranks.call(_call(3, inputs, SPREAD, None, None, other, inputs.lora))
        (new,) = ranks.call(_call(3, changed(inputs, **other)))
    target.expect_same_bits("the same layers again", first, again)
    target.expect_same_bits("after a step, and new layers", new, stepped)
    target.expect_same_bits("after a step back", first, back)


@_divided(
    "Where the tokens of all ranks follow each other as in one process, any number of ranks has the bits of one.",
    native=True,
)
def check_bits_of_one(target: Target) -> None:
    """Two, three and four ranks beside one, with each routing."""
    with RankProcesses(target) as ranks:
        for routing, (shares, ids) in ROUTINGS.items():
            inputs = _inputs(ids())
            (one,) = ranks.call(_call(1, inputs))
            for size in SIZES:
                (found,) = ranks.call(_call(size, inputs, shares))
                target.expect_same_bits(f"{routing}: one rank and {size}", one, found)


@_divided(
    "Gradients of what every rank has are added over the ranks, those of its experts' LoRA are not; the norm of all "
    "counts each once."
)
def check_reduced(target: Target) -> None:
    """Whole numbers, whose sums have one right answer: dense gradients, experts' gradients, and their norm."""
    draw = torch.Generator().manual_seed(5)
    with RankProcesses(target) as ranks:
        for size in SIZES:
            dense = [_whole(draw, 3, 5), _whole(draw, 4)], [_whole(draw, 3, 5), _whole(draw, 4)]
            given = [(dense[rank % 2], [_whole(draw, 2, 3)]) for rank in range(size)]
            found = ranks.ask(size, _reduced, given)
            sums = [torch.stack([each[0][place] for each in given]).sum(0) for place in (0, 1)]
            squares = sum(float((t.double() ** 2).sum()) for t in (*sums, *(each[1][0] for each in given)))
            norm = torch.tensor(squares).sqrt().float()
            for rank, (added, own, seen) in enumerate(found):
                where = f"{size} ranks, rank {rank}"
                right = all(torch.equal(a, b) for a, b in zip(added, sums, strict=True))
                target.expect(right, f"{where}: dense gradients are not the sum over the ranks", "bits")
                target.expect(torch.equal(own[0], given[rank][1][0]), f"{where}: LoRA gradients changed", "bits")
                target.expect(bool(seen == norm), f"{where}: the norm is {seen:.6g}, it must be {norm:.6g}", "bits")


def _whole(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=draw).float()


def _reduced(rank: Rank, given: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    dense, own = ([tensor.clone() for tensor in part] for part in given)
    norm = rank.share(CASE.num_experts).reduce(dense, own)
    return dense, own, norm


@_divided("What n ranks save, any number loads: LoRA of all experts in their order.")
def check_saved(target: Target) -> None:
    """The LoRA of four ranks put together, and cut for three: the bits of a training that never stopped."""
    inputs, other = _inputs(), make_inputs(CASE.with_seed(6)).lora
    with RankProcesses(target) as ranks:
        whole = ranks.ask(MOST, _saved, [other] * MOST)[0]
        wrong = [name for name in LORA_NAMES if not torch.equal(whole[name], other[name])]
        target.expect(not wrong, f"{', '.join(wrong)} of all experts has others in their places", "bits")
        _, gone_on = ranks.call(_call(3, inputs, SPREAD, None, other))
        (loaded,) = ranks.call(_call(3, changed(inputs, **whole)))
    target.expect_same_bits("saved by four ranks and loaded by three", gone_on, loaded)


def _saved(rank: Rank, lora: Tensors) -> Tensors:
    share = rank.share(CASE.num_experts)
    own = slice(share.experts[0], share.experts[-1] + 1)
    return {name: share.whole(value[own]) for name, value in lora.items()}
