"""A pool of processes that judge engines in parallel, for the commands `mutants` and `clean`."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from ktverify.isolation.host import end_with_parent
from ktverify.isolation.interrupt import put_off


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `jobs` processes. They end with this process, however it ends, and at once where the body raises."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)
    try:
        # Ctrl-C reaches all processes of a terminal; this one ends the others, which would each show a traceback
        with put_off():
            for _ in range(jobs):
                pool.submit(os.getpid)
        yield pool
    except BaseException:
        # nothing uses their results any more
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _prepare() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # it is spawned
    end_with_parent(parent=parent.pid or 0)
    torch.set_num_threads(1)
    # a layer's release collects garbage, and need not look through modules
    gc.collect()
    gc.freeze()
