"""Signals are deferred until the block has finished."""

import os
import signal
import threading
import time

import pytest

from adaptkit.training.signals import signals_deferred


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_arrives_after_the_block(number):
    done = []

    class Stopped(BaseException):
        pass

    def stop(number, frame):
        raise Stopped

    def work():
        with signals_deferred():
            os.kill(os.getpid(), number)
            done.append(True)

    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            work()
        assert done
        assert signal.getsignal(number) is stop
        with signals_deferred():
            pass  # no signal is left
    finally:
        signal.signal(number, before)


def test_an_interval_timer_is_paused_during_the_block():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with signals_deferred():
            time.sleep(0.5)
            assert not rang
        time.sleep(0.5)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_deferring_works_in_other_threads():
    done = []

    def work():
        with signals_deferred():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
