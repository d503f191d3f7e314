import os
import signal
import threading
from collections.abc import Iterator

import pytest

from dsft.core.signals import held_signals


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(params=[False, True], ids=["alone", "beside another thread"])
def _another_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """The live display has one."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    if request.param:
        thread.start()
    yield
    done.set()
    if request.param:
        thread.join()


@pytest.mark.usefixtures("_another_thread")
def test_ctrl_c_takes_effect_at_the_end_of_what_may_not_be_interrupted():
    reached = []

    def import_something():
        with held_signals():
            interrupt()
            sum(range(100_000))
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        import_something()
    assert reached == ["the end"]


def test_signals_come_through_again_afterwards():
    with held_signals():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_ends_a_command_waits(number: signal.Signals):
    reached = []

    def end(*_: object) -> None:
        reached.append("the signal")

    before = signal.signal(number, end)
    try:
        with held_signals():
            os.kill(os.getpid(), number)
            sum(range(100_000))
            reached.append("the end")
        assert reached == ["the end", "the signal"]
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
