"""Measure what one process gives to another of this machine by gloo: `python -m ktverify.bench.plan.link`.

It prints bytes per second. Two processes exchange rows by all_to_all_single, as engines/expert_parallel.py does.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from typing import Any

_BYTES = 32 << 20  # that each gives to the other in one exchange
_EXCHANGES = 8


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ktverify-link-") as directory:
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        both = [context.Process(target=_exchange, args=(rank, f"{directory}/group", results)) for rank in (0, 1)]
        for each in both:
            each.start()
        for each in both:
            each.join()
        if any(each.exitcode for each in both):
            raise RuntimeError("two processes could not exchange data by gloo: give --local")
        print(min(results.get(), results.get()))


def _exchange(rank: int, file: str, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    rows = torch.zeros(_BYTES, dtype=torch.bfloat16)  # half of them for each
    found, shortest = torch.empty_like(rows), float("inf")
    for _ in range(_EXCHANGES):
        begin = time.perf_counter()
        dist.all_to_all_single(found, rows)
        shortest = min(shortest, time.perf_counter() - begin)
    results.put(_BYTES / shortest)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
