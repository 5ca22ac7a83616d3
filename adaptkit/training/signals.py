"""Defer signals until a critical section has finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM while the block runs, and pause the interval timer; then raise the first signal.

    Does nothing outside of the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if callable(handler):  # neither SIG_IGN nor SIG_DFL
            signal.signal(number, lambda number, frame: arrived.append(number))
    left = signal.setitimer(signal.ITIMER_REAL, 0)[0]
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, left)
        for arrival in arrived[:1]:
            signal.raise_signal(arrival)
