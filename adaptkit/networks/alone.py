"""One thread of a process at a time computes with a model.

torch's random numbers and its default type, which building a model sets, are those of the whole process.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adaptkit.errors import ConflictError

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Have the process's models to oneself while the block runs, or what it calls.

    Raises:
        ConflictError: another thread has them. Waiting for it could be for ever, where it waits for this one.
    """
    if not _LOCK.acquire(blocking=False):
        raise ConflictError(
            "another thread of this process is already running a model",
            hint="run one after the other, or each in its own process",
        )
    try:
        yield
    finally:
        _LOCK.release()
