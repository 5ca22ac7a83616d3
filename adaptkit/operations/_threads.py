"""Process items in threads, yield the results in order, and keep few of them in memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from adaptkit.checkpoint.hashing import fingerprint_in_pieces
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.machine import processor_count

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(threads: int | None) -> int:
    """Return the number of threads to use: one per processor that the process may use if None."""
    return threads or processor_count()


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """Apply ``work`` in threads, and yield the results in the order of the items.

    At most ``threads + 1`` results exist at a time, so memory does not grow with the number of items.
    """
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def fingerprints(checkpoint: Checkpoint, threads: int, progress: Progress) -> dict[str, str]:
    """Return the fingerprints of all tensors by name; ``progress`` is called with bytes read."""
    names, found, done, total = list(checkpoint.tensors), {}, 0, checkpoint.nbytes
    digests = in_order(partial(fingerprint_in_pieces, checkpoint), names, threads)
    for name, digest in zip(names, digests, strict=True):
        found[name] = digest
        done += checkpoint.spec(name).nbytes
        progress(done, total)
    return found


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Apply ``work`` in threads, with one torch thread each, and yield the results in the order of the items.

    With more torch threads, the order of sums, and so the last bits of results, would depend on their number.
    """
    import torch  # here, so that operations without tensor arithmetic do not load it

    def alone(item: Item) -> Result:
        torch.set_num_threads(1)  # takes effect at least for the calling thread
        return work(item)

    before = torch.get_num_threads()
    try:
        yield from in_order(alone, items, threads)
    finally:
        torch.set_num_threads(before)
