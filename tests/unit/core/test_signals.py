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
