"""A child forked for risky work has no files, output or signals of its parent, and does not outlive it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading

import pytest

from adaptkit import child
from adaptkit.child import can_fork, start_child


@pytest.fixture
def children():
    """Kill the children that a test has started."""
    started = []
    yield started
    for process, connection in started:
        process.kill()
        process.join()
        connection.close()


def start(children, work, *arguments):
    children.append(start_child(work, *arguments))
    return children[-1]


def test_the_child_gets_its_arguments_and_can_answer(children):
    _, connection = start(children, lambda connection, *given: connection.send([os.getppid(), *given]), "a", 2)
    assert connection.recv() == [os.getpid(), "a", 2]


def test_the_child_has_none_of_its_parents_open_files(children, tmp_path):
    def work(connection):
        connection.send(sorted(int(name) for name in os.listdir("/proc/self/fd")))

    with (tmp_path / "file").open("w") as file:
        _, connection = start(children, work)
        found = connection.recv()
        assert file.fileno() > 2
    assert len([number for number in found if number > 2]) == 2, "its connection, and the listing's own"


def test_the_output_of_the_child_is_discarded(tmp_path):
    code = (
        "import os, sys\n"
        "from adaptkit.child import start_child\n"
        "def work(connection):\n"
        "    print('heard'); os.write(1, b'heard'); os.write(2, b'heard'); sys.stdout.flush()\n"
        "process, _ = start_child(work)\n"
        "process.join()\n"
        "sys.exit(process.exitcode)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_child_ignores_sigint_and_is_ended_by_sigterm(children):
    process, connection = start(children, lambda connection: connection.send(connection.recv()))
    os.kill(process.pid, signal.SIGINT)
    connection.send("there")
    assert connection.recv() == "there"
    process, connection = start(children, lambda connection: (connection.send("begun"), signal.pause()))
    assert connection.recv() == "begun"
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def test_a_signal_right_after_the_fork_does_not_run_the_parents_handler_in_the_child():
    code = (
        "import os, signal, sys\n"
        "from adaptkit.child import start_child\n"
        "os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "process, connection = start_child(lambda connection: connection.send('there'))\n"
        "print(connection.recv()); process.join(); sys.exit(process.exitcode)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "there\n", "")


def test_killing_the_parent_kills_a_child_that_ignores_its_connection():
    code = (
        "import os, signal, sys\n"
        "from adaptkit.child import start_child\n"
        "_, connection = start_child(lambda connection: (connection.send(os.getpid()), signal.pause()))\n"
        "print(connection.recv(), flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        found = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert not select.select([found], [], [], 0)[0]
            parent.kill()
            assert select.select([found], [], [], 5)[0], "the handle of a process is readable once it has exited"
        finally:
            parent.kill()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(found, signal.SIGKILL)
            os.close(found)


def test_a_child_whose_parent_has_already_died_exits():
    """The signal for a parent's death is sent only to processes that requested it before."""
    code = (
        "import os, sys; from multiprocessing import Pipe\n"
        "from adaptkit.child import _begin\n"
        "here, there = Pipe()\n"
        "_begin(there, os.getppid() + int(sys.argv[1]), lambda connection: os._exit(2), ())"
    )
    codes = [subprocess.run([sys.executable, "-c", code, off]).returncode for off in ("0", "1")]
    assert codes == [2, 1]


def test_forking_is_allowed_only_on_linux_without_other_threads(monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert can_fork() == (sys.platform == "linux")
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not can_fork()
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    with monkeypatch.context() as ignored:
        ignored.setattr(signal, "getsignal", {signal.SIGCHLD: signal.SIG_IGN}.get)
        assert not can_fork()
    monkeypatch.setattr(child.sys, "platform", "darwin")
    assert not can_fork()
