"""A lock that lets one thread of a process at a time run models.

torch's random state and its default dtype, which building a model sets, are global to the process.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adaptkit.errors import ConflictError

_LOCK = threading.RLock()


@contextmanager
def model_lock() -> Iterator[None]:
    """Hold the lock, which is reentrant, while the block or the decorated function runs.

    Raises:
        ConflictError: another thread holds the lock. Waiting for it could deadlock if it waits for this thread.
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
