"""How large a low-rank change may be: a rank, or a share of the square norm; and matrix work for several at once."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from adaptkit.errors import UsageError
from adaptkit.operations._pipeline import in_order

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_size(rank: int | None, energy: float | None) -> None:
    """Refuse anything but one of the two, in its range.

    Raises:
        UsageError: says which it is.
    """
    if (rank is None) == (energy is None):
        raise UsageError("give either a rank or a share of the energy", hint="--rank 16, or --energy 0.99")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy}: must be above 0 and at most 1", hint="0.99 keeps 99 % of the square norm")


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that cannot work.

    Raises:
        UsageError: it is less than one.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot work", hint="at least one")


def each(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Apply ``work`` to several items at once, and yield the results in the order of the items.

    The matrix library is kept to one thread an item while the results are taken: with more, the order of its sums, and
    so the last bits, would depend on how many there are.
    """

    def alone(item: Item) -> Result:
        torch.set_num_threads(1)  # holds for the calling thread, whatever it holds for in others
        return work(item)

    before = torch.get_num_threads()
    try:
        yield from in_order(alone, items, threads)
    finally:
        torch.set_num_threads(before)
