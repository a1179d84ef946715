"""The processes that divide the experts of a layer in checks: what is said where one raises or ends."""

from __future__ import annotations

import os

import pytest

from ktverify.checks.rank_processes import Rank, RankProcesses
from ktverify.checks.target import Target
from ktverify.isolation.child import Child


def _act(rank: Rank, how: str) -> int:
    if how == "ends":
        os._exit(3)
    if how == "raises":
        raise ValueError("no such row")
    return rank.share(4).rank


def _said(how: str) -> str:
    with RankProcesses(Target("torch_bf16"), 3) as ranks:
        try:
            return str(ranks.ask(2, _act, ["stays", how]))
        except RuntimeError as error:
            return str(error)


@pytest.mark.parametrize(
    ("how", "said"),
    [("stays", "[0, 1]"), ("raises", "rank 1 of 2: ValueError: no such row"), ("ends", "rank 1 of 2 ended")],
)
def test_a_rank_that_raises_or_ends_is_named(how: str, said: str) -> None:
    """In a process without threads, as a check is."""
    with Child() as child:
        assert child.call(_said, how) == said
