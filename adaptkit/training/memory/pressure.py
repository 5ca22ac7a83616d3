"""Recover when a batch runs out of memory: checkpoint more layers, then move optimizer pages to the host.

    a batch runs out of memory    with policy ``auto``, layers that are not checkpointed are from now on; if there are
                                  none, or if that is not enough, all pages are evicted to host memory. After each of
                                  these steps the batch is retried from its beginning
    later batches as large        pages are evicted before the batch starts
    smaller batches               pages are brought back, up to the budget
    evaluation, generation        pages are evicted likewise, brought back afterwards, and evicted before the next one

A batch's result depends only on seed and step, so a retry gives the same bits. It starts from the first micro-batch of
the step, since the failed one may have accumulated part of its gradients. With a sharded base, processes exchange
layers while they compute, so one cannot retry without the others; there the batch fails.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from adaptkit.training.memory.paging import Pages
from adaptkit.training.network.pinned import HostMemory
from adaptkit.training.out_of_memory import is_out_of_memory, out_of_memory_error
from adaptkit.wording import counted

Result = TypeVar("Result")

_SMALLER = "use a smaller --micro-batch-size or --max-length, --checkpointing sqrt, or --optimizer adamw8bit"


@dataclass(frozen=True)
class _Task:
    """A computation that may run out of memory.

    Attributes:
        where: phrase that says where it happens, for error messages.
        hint: what would need less memory, for error messages.
        tokens: size of the largest micro-batch; None if the task is not a batch.
    """

    where: str
    hint: str
    tokens: int | None = None


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
        self._budget_bytes = self._pages.budget_bytes
        self._failed_tokens: int | None = None
        self._failed_tasks: set[str] = set()

    def relieve(self, tokens: int, compute: Callable[[], Result]) -> Result:
        """Compute a batch; if it runs out of memory, free some and retry.

        Args:
            tokens: size of the largest micro-batch, padding included.
            compute: computes the batch; may be called repeatedly.

        Raises:
            UsageError: out of memory, and no more could be freed.
        """
        task = _Task(f"in a micro-batch of {counted(tokens, 'token')}", _SMALLER, tokens)
        if any(memory.is_short for memory in self._memories):
            self._memories = []
            self._note("warning: no more host memory can be pinned, so copies to and from the GPU are slower")
        self._set_budget(
            0 if self._failed_tokens is not None and tokens >= self._failed_tokens else self._budget_bytes, task
        )
        return self._compute(compute, task)

    def make_room(self, where: str, hint: str, compute: Callable[[], Result]) -> Result:
        """Compute a task other than a batch; pages evicted for it come back afterwards, if they fit.

        Args:
            where: phrase that says where it happens, for error messages; also identifies tasks of the same kind.
            hint: what would need less memory, for error messages.
            compute: computes the task; may be called repeatedly.

        Raises:
            UsageError: out of memory, and no more could be freed.
        """
        task, before = _Task(where, hint), self._pages.budget_bytes
        if where in self._failed_tasks:
            self._set_budget(0, task)
        result = self._compute(compute, task)
        self._set_budget(before, task)
        return result

    def _compute(self, compute: Callable[[], Result], task: _Task) -> Result:
        steps = self._free_memory(task)
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            # Outside the except block: its traceback keeps the failed computation's tensors alive.
            gc.collect()
            done = next(steps, "")
            if not done:
                raise out_of_memory_error(task.where, reason, task.hint)
            self._pages.counters.retries += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._note(f"warning: out of memory {task.where}; {done}, trying again")

    def _free_memory(self, task: _Task) -> Iterator[str]:
        """Free memory in one way after the other; yield a phrase after each."""
        if not self._can_retry:
            return
        if task.tokens is not None and self._keep_less():
            yield "checkpointed all layers"
        if self._pages.can_shrink:
            if task.tokens is None:
                self._failed_tasks.add(task.where)
            else:
                self._failed_tokens = min(task.tokens, self._failed_tokens or task.tokens)
            self._set_budget(0, task)
            yield "paged out optimizer state"

    def _set_budget(self, budget_bytes: int | None, task: _Task) -> None:
        reason = ""
        if self._pages.budget_bytes == budget_bytes:
            return
        for budget in dict.fromkeys((budget_bytes, 0)):  # if they do not fit, evict all; a later batch tries again
            try:
                self._pages.set_budget(budget)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
        raise out_of_memory_error(task.where, reason, task.hint)
