"""A fork of this process for what may take for ever, or all memory: it can be ended, and ends when its parent does."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_MOST_HANDLES = 1 << 16
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def can_fork() -> bool:
    """Whether a fork is safe (no other threads, no other system than Linux) and allowed (no daemonic process)."""
    alone = threading.active_count() == 1 and not multiprocessing.current_process().daemon
    return sys.platform == "linux" and alone


def start_child(work: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Fork, and let the fork call ``work(connection, *arguments)``.

    What it prints goes nowhere, signals that are meant for the parent leave it alone, and of the parent's open files it
    has none: locks and sockets stay open, whoever closes them, as long as a fork has them.

    Returns:
        The process, and the end of its connection that is the parent's.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_begin, args=(theirs, os.getpid(), work, arguments), daemon=True)
    # A signal that reaches the fork before it has its own ways with signals would run the parent's code there.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():  # Python warns of threads that torch's libraries may have; the fork runs none
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, mine


def _begin(connection: Connection, parent: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux":  # elsewhere it ends when it finds that nobody reads what it says
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the parent may be killed, too
    if os.getppid() != parent:  # and was, before that
        os._exit(1)
    nowhere, kept = os.open(os.devnull, os.O_WRONLY), connection.fileno()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.closerange(3, kept)
    os.closerange(kept + 1, min(os.sysconf("SC_OPEN_MAX"), _MOST_HANDLES))
    work(connection, *arguments)
