"""Runs the command line in forked children of a process that has already imported everything."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from disk import WRITES, Call, Hook, Layer
from jobs import TEMPORARY

NOT_BEGUN = 99
"""Exit code of a child that received a signal before adaptkit had installed its handlers."""
_HANDLED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Point:
    """A moment of a run: before, within (only of a write) or after its n-th call of a kind."""

    number: int
    when: str
    counter: str = "write"

    def __str__(self) -> str:
        return f"{self.when} {self.counter} {self.number}"


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it, and all that it printed."""

    code: int
    said: str


def counter_of(kind: str) -> str:
    """Return the name of the layer's counter that counts calls of a kind."""
    return "write" if kind in WRITES else kind


def dies_at(point: Point, number: int) -> Hook:
    """Return a hook that sends its own process a signal at a point.

    In a resumed run, the call of this number may be a write, although it was of another kind in the undisturbed run.
    After a write nothing is sent: an error there makes its caller write again, which a signal in a real write cannot.
    """

    def hook(call: Call) -> int | None:
        if counter_of(call.kind) != point.counter:
            return None
        if point.when == "in":  # a short write; the rest of the data follows in the next call
            if call.number == point.number + 1 and call.before:
                _send(number)
            return 7 if call.number == point.number else None  # bytes: within a line, a header or a tensor
        is_written = call.kind == "write" and not call.before
        if call.number == point.number and call.before == (point.when == "before") and not is_written:
            _send(number)
        return None

    return hook


def _send(number: int) -> None:
    """Send this process a signal; if this is the main thread, which handles signals, send it to this thread.

    A signal to the process may reach the main thread a moment later, within the layer's own code. Its write would then
    look to the caller as if it had not happened, which cannot occur with a real write.
    """
    if threading.current_thread() is threading.main_thread():
        signal.pthread_kill(threading.get_ident(), number)
    else:
        os.kill(os.getpid(), number)


def records(path: Path) -> Hook:
    """Return a hook that logs each completed call as a line."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write = os.write  # the original, not the layer's

    def hook(call: Call) -> None:
        if not call.before:
            write(log, (json.dumps([call.number, call.kind, call.path, call.target]) + "\n").encode())

    return hook


def recorded(path: Path) -> list[Call]:
    """Read the calls that ``records`` logged."""
    return [Call(*json.loads(line), before=False) for line in path.read_text().splitlines()]


class Children:
    """Runs commands and functions in forked children.

    Args:
        root: folder that the layer watches.
        log: file that receives the output of a child.
    """

    def __init__(self, root: Path, log: Path) -> None:
        self._root, self._log = root, log

    def start(self, arguments: list[str], trial: Path, hook: Hook | None = None) -> int:
        """Start ``adaptkit`` in the folder of a trial; return the child's process id."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)  # until the child has installed handlers
        child = os.fork()
        if child == 0:
            self._adaptkit(arguments, trial, hook)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        return child

    def call(self, act: Callable[[], Any], trial: Path) -> Ended:
        """Call a function in a child, and wait for its end."""
        child = os.fork()
        if child == 0:
            self._leave(lambda: act() and None, trial)
        return self.wait(child)

    def run(self, arguments: list[str], trial: Path, hook: Hook | None = None) -> Ended:
        """Run ``adaptkit`` and wait for its end."""
        return self.wait(self.start(arguments, trial, hook))

    def wait(self, child: int) -> Ended:
        """Wait for a child's end."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ended(code, self._log.read_text(errors="replace"))

    def strike(self, child: int, delay_s: float, number: int) -> Ended:
        """Send a child a signal after a delay, and wait for its end."""
        time.sleep(delay_s)
        os.kill(child, number)
        return self.wait(child)

    def _adaptkit(self, arguments: list[str], trial: Path, hook: Hook | None) -> NoReturn:
        def act() -> None:
            import torch

            from adaptkit.checkpoint import direct
            from adaptkit.cli.main import main

            direct._PIECE_BYTES = 4096  # write small files in several pieces, like large ones
            torch.set_num_threads(1)  # the parent's thread pool does not exist after a fork, so it must not be used
            if hook is not None:
                Layer(self._root, hook).install()
            sys.argv = ["adaptkit", *arguments]
            main()

        for number in _HANDLED:  # until main() installs its own handlers
            signal.signal(number, lambda *_: os._exit(NOT_BEGUN))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        self._leave(act, trial)

    def _leave(self, act: Callable[[], None], trial: Path) -> NoReturn:
        """Run a function and exit like a separate process would."""
        code: Any = 70
        try:
            for stream, path in ((0, os.devnull), (1, self._log), (2, self._log)):
                flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if stream == 1 else os.O_APPEND)
                os.dup2(os.open(path, flags | os.O_APPEND), stream)
            os.chdir(trial)
            tempfile.tempdir = str(trial / TEMPORARY)
            act()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
