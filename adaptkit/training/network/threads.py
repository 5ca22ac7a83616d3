"""Loops over rows, divided among as many threads as torch uses for a product of matrices."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_LEAST_ELEMENTS, _LEAST_THREADS = 1 << 18, 4
"""Elements, and threads, for which dividing is worth handing over: two threads take as long as one."""


def in_parts(rows: int, elements: int, compute: Callable[[int, int, int], None]) -> None:
    """Compute rows in parts, one for each thread; the first is computed in the calling one.

    Args:
        rows: number of rows.
        elements: of all rows together; few are computed in one part.
        compute: called with the number of a part, its first row and one past its last row; releases the GIL. No part
            may read or write what another one writes.
    """
    parts = min(rows, thread_count()) if are_shared(elements) else 1
    ends = [rows * part // parts for part in range(parts + 1)]
    jobs = [_pool().submit(compute, part, ends[part], ends[part + 1]) for part in range(1, parts)]
    compute(0, 0, ends[1])
    for job in jobs:
        job.result()


def are_shared(elements: int) -> bool:
    """Return whether several threads compute so many elements."""
    return elements >= _LEAST_ELEMENTS and thread_count() >= _LEAST_THREADS


def thread_count() -> int:
    """Return the most parts that there are."""
    return int(torch.get_num_threads())


@functools.cache
def _pool() -> ThreadPoolExecutor:
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
    return ThreadPoolExecutor(os.cpu_count(), "adaptkit-kernel")
