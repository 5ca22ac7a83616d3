"""A forked child process for work that may hang or use up memory: it can be killed, and dies with its parent."""

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
    """Return whether forking is safe (Linux, a single thread) and allowed (this process is not daemonic).

    Where SIGCHLD is ignored, nobody learns how a child ended; the command line does not ignore it.
    """
    alone = threading.active_count() == 1 and not multiprocessing.current_process().daemon
    return sys.platform == "linux" and alone and signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN


def start_child(work: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Fork a child process that calls ``work(connection, *arguments)``.

    The child's stdout and stderr are discarded. It ignores SIGINT, which is meant for the parent; SIGTERM kills it.
    It closes all files inherited from the parent: otherwise locks and sockets that the parent closes would stay open.

    Returns:
        The process, and the parent's end of the connection.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_begin, args=(theirs, os.getpid(), work, arguments), daemon=True)
    # A signal that reaches the child before it sets its own handlers would run the parent's handlers there.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():  # Python warns if torch's libraries have threads; the child uses none
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
    if sys.platform == "linux":  # elsewhere it ends when its connection breaks
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # die even if the parent is killed
    if os.getppid() != parent:  # the parent died before the call to prctl
        os._exit(1)
    nowhere, kept = os.open(os.devnull, os.O_WRONLY), connection.fileno()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.closerange(3, kept)
    os.closerange(kept + 1, min(os.sysconf("SC_OPEN_MAX"), _MOST_HANDLES))
    work(connection, *arguments)
