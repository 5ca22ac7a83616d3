"""Kernels whose rows are divided among as many threads as torch uses for a matrix product."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from adaptkit.numerics.kernels._jit import jit

_MIN_ELEMENTS, _MIN_THREAD_ELEMENTS = 1 << 18, 1 << 14
"""Elements required to use several threads, and for each of them."""


def shared(divided: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorate a kernel that is run in parts; no part may read or write what another part writes.

    The function takes one more argument than its callers pass, the part: its number, which is less than
    ``thread_count()``, its first row, and one past its last row.

    Args:
        divided: name of the argument whose first axis is the rows.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        kernel, place = jit(function), list(inspect.signature(function).parameters).index(divided)

        @functools.wraps(function)
        def run(*arguments: Any) -> None:
            rows, size = len(arguments[place]), arguments[place].size
            parts = min(rows, size // _MIN_THREAD_ELEMENTS, thread_count()) if size >= _MIN_ELEMENTS else 1
            if parts <= 1:
                kernel(*arguments, (0, 0, rows))
                return
            ends = [rows * part // parts for part in range(parts + 1)]
            compute = functools.partial(kernel, *arguments)
            jobs = [_pool().submit(compute, (n, ends[n], ends[n + 1])) for n in range(1, parts)]
            compute((0, 0, ends[1]))
            for job in jobs:
                job.result()

        return run

    return decorate


def thread_count() -> int:
    """Return the maximum number of parts of a kernel."""
    return int(torch.get_num_threads())


@functools.cache
def _pool() -> ThreadPoolExecutor:
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
    return ThreadPoolExecutor(os.cpu_count(), "adaptkit-kernel")
