"""Recover when a computation runs out of memory: checkpoint more layers, then move optimizer pages to the host.

With policy ``auto``, layers that are not checkpointed are from now on; if there are none, or if that is not enough, all
pages of optimizer state are evicted to host memory for the rest of the run. Evaluation and generation record no graph,
so for these only pages are evicted. After each of these steps the computation starts again from its beginning.

A batch's result depends only on seed and step, so a retry gives the same bits. It starts from the first micro-batch of
the step, since the failed one may have accumulated part of its gradients. With a sharded base, processes exchange
layers while they compute, so one cannot retry without the others; there the batch fails.
"""

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from adaptkit.training.memory.paging import Pages
from adaptkit.training.network.pinned import HostMemory
from adaptkit.training.out_of_memory import is_out_of_memory, out_of_memory_error, reports_out_of_memory
from adaptkit.wording import counted

Result = TypeVar("Result")

_SMALLER = "use a smaller --micro-batch-size or --max-length, --checkpointing sqrt, or --optimizer adamw8bit"


class Pressure:
    """Retries batches, and tasks between them, that run out of memory, after freeing some.

    Args:
        pages: pages of optimizer state, to be evicted.
        note: called with a one-line message when memory is freed, and once if host memory cannot be pinned.
        others: further host memory that a device copies from.
        can_retry: whether a process can retry without the others.
        keep_less: reduces the activations that batches keep; returns whether it could.
    """

    def __init__(
        self,
        pages: Pages,
        note: Callable[[str], None],
        others: Iterable[HostMemory] = (),
        can_retry: bool = True,
        keep_less: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pages, self._note, self._can_retry, self._keep_less = pages, note, can_retry, keep_less
        self._memories = [pages.memory, *others]

    def relieve(self, tokens: int, compute: Callable[[], Result]) -> Result:
        """Compute a batch; if it runs out of memory, free some and retry.

        Args:
            tokens: size of the largest micro-batch, padding included.
            compute: computes the batch; may be called repeatedly.

        Raises:
            UsageError: out of memory, and no more could be freed.
        """
        if any(memory.is_short for memory in self._memories):
            self._memories = []
            self._note("warning: no more host memory can be pinned, so copies to and from the GPU are slower")
        where = f"in a micro-batch of {counted(tokens, 'token')}"
        return self._retried(where, _SMALLER, compute, self._checkpoint, self._evict)

    def make_room(self, where: str, hint: str, compute: Callable[[], Result]) -> Result:
        """Compute a task other than a batch; if it runs out of memory, evict pages and retry.

        Args:
            where: phrase that says where it happens, for error messages.
            hint: what would need less memory, for error messages.
            compute: computes the task; may be called repeatedly.

        Raises:
            UsageError: out of memory, and no more could be freed.
        """
        return self._retried(where, hint, compute, self._evict)

    def _retried(self, where: str, hint: str, compute: Callable[[], Result], *ways: Callable[[], str]) -> Result:
        """Compute; after every failure free memory in the next of the ways that can, which returns what it did."""
        left = iter(ways if self._can_retry else ())
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            # Outside the except block: its traceback keeps the failed computation's tensors alive.
            gc.collect()
            with reports_out_of_memory(where, hint):
                done = next(filter(None, (free() for free in left)), "")
            if not done:
                raise out_of_memory_error(where, reason, hint)
            self._pages.counters.retries += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._note(f"warning: out of memory {where}; {done}, trying again")

    def _checkpoint(self) -> str:
        return "checkpointed all layers" if self._keep_less() else ""

    def _evict(self) -> str:
        if not self._pages.can_shrink:
            return ""
        self._pages.set_budget(0)
        return "paged out optimizer state"
