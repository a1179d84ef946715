"""The traffic of a plan, beside what ranks really send, and its times: formulas, efficiencies, routing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ktverify.bench.plan.memory import Load, layer_use
from ktverify.bench.plan.splits import Split
from ktverify.bench.plan.steps import Efficiency, Routing, reached, step_time, traffic_bytes
from ktverify.engines.expert_parallel import Share
from tests.support import ranks
from tests.support.plans import GPU, ONE, SMALL, TWO

# ---- traffic, beside torch.distributed


def sent_by_ranks() -> dict[str, list[int]]:
    """By routing: bytes of rows that this rank hands over, its own experts' among them and without; and its tokens."""
    found: dict[str, list[int]] = {}
    plain, rank = dist.all_to_all_single, dist.get_rank()

    def counted(name: str, output: Any, given: Any, received: Any, sent: list[int], **more: Any) -> Any:
        if given.dtype == torch.bfloat16:  # rows, and not how many of them there are
            of_row = given[0].nbytes if len(given) else 0
            found[name][0] += of_row * sum(sent)
            found[name][1] += of_row * (sum(sent) - sent[rank])
        return plain(output, given, received, sent, **more)

    share = Share(dist.group.WORLD, ranks.CASE.num_experts)
    for name, (parts, ids) in ranks.routings().items():
        tokens = ranks.tokens_of(parts, share.rank, share.size)
        found[name] = [0, 0, tokens.stop - tokens.start]
        dist.all_to_all_single = partial(counted, name)
        ranks._one_call(share, ranks.inputs_of(ids), tokens)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_send_what_the_plan_says(size: int, tmp_path: Path) -> None:
    every = ranks.on_ranks(size, tmp_path, sent_by_ranks)
    case = ranks.CASE
    for name, (_, ids) in ranks.routings().items():
        slots = (ids[: sum(found[name][2] for found in every)] >= 0).mean()
        expected = traffic_bytes(case.qlen, case.top_k, case.hidden) * slots
        assert sum(found[name][0] for found in every) == pytest.approx(expected), name
        assert sum(found[name][1] for found in every) <= expected
    spread = [found["spread"][1] for found in every]
    assert sum(spread) == pytest.approx(traffic_bytes(23, 3, 40) * (size - 1) / size, rel=0.25)


# ---- times


def test_as_many_experts_are_reached_as_random_tokens_reach() -> None:
    drawn = torch.Generator().manual_seed(1)
    for experts, top_k, tokens in ((16, 4, 3), (64, 6, 9), (8, 2, 1)):
        ids = torch.rand(400, tokens, experts, generator=drawn).topk(top_k).indices
        mean = sum(len(set(call.flatten().tolist())) for call in ids) / len(ids)
        assert reached([1 / experts] * experts, top_k, tokens) == pytest.approx(mean, rel=0.02)
    assert reached([0.5, 0.5, 0.0], 2, 7) == 2
    assert reached([0.25] * 4, 1, 0) == 0


def test_rooflines_and_traffic_are_the_formulas() -> None:
    load, routing, limit = Load(4096, 8, "bf16"), Routing.even(SMALL), Efficiency()
    rows, h, i, r, layers = 4096 * 2, 512, 256, 8, 2
    flops = layers * (rows * 6 * h * i * 2 + rows * 6 * r * (h + i) * 3)  # backward: base once more, LoRA twice
    assert step_time(SMALL, ONE, TWO, load, routing, limit).seconds == pytest.approx(flops / 2e12)
    assert step_time(SMALL, Split("TP", parts=2), TWO, load, routing, limit).seconds == pytest.approx(flops / 4e12)
    ranks_of_nodes = step_time(SMALL, Split("EP", ranks=4), TWO, load, routing, limit)
    assert ranks_of_nodes.compute == pytest.approx(flops / 8e12)
    rows_of_one = layers * 4 * (4096 / 4) * 2 * 512 * 2
    assert ranks_of_nodes.sent == pytest.approx(rows_of_one * 3 / 4)
    # a quarter goes to the other process of the machine, a half to the other machine, as that process's does
    assert ranks_of_nodes.traffic == pytest.approx(rows_of_one / 4 / 2e9 + 2 * rows_of_one / 2 / 1e9)
    # one token: two experts are read, in both directions
    few = step_time(SMALL, ONE, TWO, Load(1, 8, "int4"), routing, limit)
    read = 2 * layers * 2 * layer_use(SMALL, ONE, Load(1, 8, "int4")).expert
    assert few.seconds == pytest.approx(read / 2e9)
    half = Efficiency({"forward": [(1.0, 0.5)], "backward": [(1.0, 0.25)]})
    assert step_time(SMALL, ONE, TWO, load, routing, half).seconds == pytest.approx(3 * flops / 2e12, rel=0.02)


def test_efficiency_lies_between_its_points() -> None:
    found = Efficiency({"forward": [(1.0, 0.2), (4.0, 0.6), (64.0, 0.5)]})
    assert [found.share("forward", rows) for rows in (0.5, 1, 2, 4, 16, 64, 999)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.55, 0.5, 0.5]
    )
    assert found.share("backward", 3) == 1
    # eight tokens that reach eight experts have one row each, as one token has
    twice = Efficiency({"forward": [(1.0, 0.2), (1.0, 0.4), (4.0, 0.6)]})
    assert [twice.share("forward", rows) for rows in (0.5, 1, 2, 4)] == pytest.approx([0.2, 0.4, 0.5, 0.6])


def test_counts_of_a_mask_file_choose_experts_and_slow_the_fullest_rank() -> None:
    counts = [[70, 10, 10, 10, 0, 0, 0, 0], [10, 70, 10, 10, 0, 0, 0, 0]]
    routing = Routing.of_counts(SMALL, counts, "mask.json")
    load, split = Load(4096, 8, "bf16"), Split("EP", ranks=4)
    even = step_time(SMALL, split, TWO, load, Routing.even(SMALL), Efficiency())
    uneven = step_time(SMALL, split, TWO, load, routing, Efficiency())
    assert uneven.compute == pytest.approx(even.compute * 0.8 * 4)  # experts 0 and 1 are on one rank
    slow = replace(GPU, peak=4e11)  # so that arithmetic rules
    hybrid = step_time(SMALL, Split("hybrid", parts=2, gpu_experts=1), slow, load, routing, Efficiency())
    alone = step_time(SMALL, Split("TP", parts=2), slow, load, routing, Efficiency())
    assert hybrid.compute == pytest.approx(0.3 * alone.compute)
    with pytest.raises(ValueError, match=r"mask.json counts 1 layers of \[3\] experts"):
        Routing.of_counts(SMALL, [[1, 2, 3]], "mask.json")
