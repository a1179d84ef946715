"""Which experts the tokens of a case go to, and the order of the experts in memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ktverify.spec.cases import Case
from ktverify.spec.generator import case_key, hashes


def route(case: Case) -> npt.NDArray[np.int64]:
    """expert_ids [T, k] int64."""
    rows, slots, experts = case.qlen, case.top_k, case.num_experts
    key = case_key(case, "routing")
    if case.routing == "zipf":
        ids = _zipf(case, key)
    else:
        # the order of E hashes per token is a random permutation; its first k entries are the experts
        draws = hashes(key, rows * experts).reshape(rows, experts)
        ids = np.argsort(draws, axis=1, kind="stable")[:, :slots].astype(np.int64)
    if case.routing == "one_expert" and rows:
        chosen = ids[0, 0]
        taken = ids == chosen
        # where the chosen expert is in another slot already, that slot gets the expert of slot 0
        ids = np.where(taken, ids[:, :1], ids)
        ids[:, 0] = chosen
    elif case.routing == "duplicate":
        ids[:, 1] = ids[:, 0]
    elif case.routing == "masked":
        keep = ids.copy()
        ids[hashes(case_key(case, "mask"), rows * slots).reshape(rows, slots) % np.uint64(4) == 0] = -1
        ids[:1] = keep[:1]
        if rows > 1:
            ids[-1] = -1
    elif case.routing == "all_masked":
        ids[:] = -1
    return np.ascontiguousarray(ids)


def _zipf(case: Case, key: np.uint64) -> npt.NDArray[np.int64]:
    """expert_ids [T, k]: k draws without replacement, the expert of popularity n with weight 2^32 // n."""
    rows, slots, experts = case.qlen, case.top_k, case.num_experts
    popular = np.argsort(hashes(case_key(case, "popularity"), experts), kind="stable")
    weight = np.array([(1 << 32) // (place + 1) for place in range(experts)], np.uint64)
    draws = hashes(key, rows * slots).reshape(rows, slots)
    ids = np.empty((rows, slots), np.int64)
    for row in range(rows):
        left = weight.copy()
        for slot in range(slots):
            threshold = np.cumsum(left)
            place = int(np.searchsorted(threshold, draws[row, slot] % threshold[-1], side="right"))
            ids[row, slot] = popular[place]
            left[place] = 0
    return ids


def physical_map(case: Case) -> npt.NDArray[np.int64]:
    """[E] int64: the logical expert in each physical slot."""
    if case.physical == "identity":
        return np.arange(case.num_experts, dtype=np.int64)
    return np.argsort(hashes(case_key(case, "physical_map"), case.num_experts), kind="stable").astype(np.int64)
