"""Room for long batches: layers keep less, and pages of optimizer state leave the device, when memory runs out.

    a batch runs out of memory    layers that keep everything, though nobody asked for it, are checkpointed from here
                                  on; if there is none, or that is not enough, all pages go to host memory. Then the
                                  batch is computed once more, from its beginning
    later batches as large        begin with the pages gone
    smaller ones                  the pages come back, up to the budget
    a measurement, answers        the same; the pages come back when it is done, and leave before the next of its kind

Computing a batch is a function of seed and step, so that trying again changes no bit. It begins again from the first
micro-batch of the step, since the one that failed may have added half of its gradients. Processes that share a base
exchange its layers while they compute, so that none of them can begin again alone; there a batch fails.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from adaptkit.checkpoint.progress import counted
from adaptkit.training.memory.paging import Pages
from adaptkit.training.network.pinned import HostMemory
from adaptkit.training.shortage import is_out_of_memory, shortage

Result = TypeVar("Result")

_SMALLER = "use a smaller --micro-batch-size or --max-length, --checkpointing sqrt, or --optimizer adamw8bit"


@dataclass(frozen=True)
class _Task:
    """What may run out of memory.

    Attributes:
        where: that is: a phrase.
        hint: what would take less.
        tokens: of the largest micro-batch, if it is a batch.
    """

    where: str
    hint: str
    tokens: int | None = None


class Pressure:
    """Watches for batches, and tasks between them, that run out of memory.

    Args:
        pages: of optimizer state, give way.
        note: told, in a line for people, when it does; and once if copies to and from host memory have to wait.
        others: further host memory that a device copies from.
        is_alone: whether a process can compute something once more without the others.
        keep_less: lets a batch keep less than it did; whether it could.
    """

    def __init__(
        self,
        pages: Pages,
        note: Callable[[str], None],
        others: Iterable[HostMemory] = (),
        is_alone: bool = True,
        keep_less: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pages, self._note, self._is_alone, self._keep_less = pages, note, is_alone, keep_less
        self._memories = [pages.memory, *others]
        self._budget_bytes = self._pages.budget_bytes
        self._limit: int | None = None
        self._short: set[str] = set()

    def relieve(self, tokens: int, compute: Callable[[], Result]) -> Result:
        """Compute a batch; if it runs out of memory, make room and compute it once more.

        Args:
            tokens: of the largest micro-batch, padding included.
            compute: can be called again.

        Raises:
            UsageError: there is nothing to give way, or it did not help.
        """
        task = _Task(f"in a micro-batch of {counted(tokens, 'token')}", _SMALLER, tokens)
        if any(memory.is_short for memory in self._memories):
            self._memories = []
            self._note("warning: no more host memory can be pinned, so copies to and from the GPU are slower")
        self._hold(0 if self._limit is not None and tokens >= self._limit else self._budget_bytes, task)
        return self._compute(compute, task)

    def make_room(self, where: str, hint: str, compute: Callable[[], Result]) -> Result:
        """Compute what is no batch; pages that leave for it come back when it is done, if there is room then.

        Args:
            where: memory may run out: a phrase.
            hint: what would take less.
            compute: can be called again.

        Raises:
            UsageError: there is nothing to give way, or it did not help.
        """
        task, before = _Task(where, hint), self._pages.budget_bytes
        if where in self._short:
            self._hold(0, task)
        result = self._compute(compute, task)
        self._hold(before, task)
        return result

    def _compute(self, compute: Callable[[], Result], task: _Task) -> Result:
        ways = self._ways(task)
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            # Only here, where nothing refers to the failed computation any more, is its memory free.
            gc.collect()
            done = next(ways, "")
            if not done:
                raise shortage(task.where, reason, task.hint)
            self._pages.counters.retries += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._note(f"warning: out of memory {task.where}; {done}, trying again")

    def _ways(self, task: _Task) -> Iterator[str]:
        """Make room in one way after the other, and say what was done."""
        if not self._is_alone:
            return
        if task.tokens is not None and self._keep_less():
            yield "checkpointed all layers"
        if self._pages.can_shrink:
            if task.tokens is None:
                self._short.add(task.where)
            else:
                self._limit = min(task.tokens, self._limit or task.tokens)
            self._hold(0, task)
            yield "paged out optimizer state"

    def _hold(self, budget_bytes: int | None, task: _Task) -> None:
        reason = ""
        if self._pages.budget_bytes == budget_bytes:
            return
        for budget in dict.fromkeys((budget_bytes, 0)):  # they come back before a later batch, if there is room then
            try:
                self._pages.set_budget(budget)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
        raise shortage(task.where, reason, task.hint)
