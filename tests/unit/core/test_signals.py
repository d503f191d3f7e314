import os
import signal

import pytest

from dsft.core.signals import held_signals


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_takes_effect_at_the_end_of_what_may_not_be_interrupted():
    reached = []

    def import_something():
        with held_signals():
            interrupt()
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        import_something()
    assert reached == ["the end"]


def test_signals_come_through_again_afterwards():
    with held_signals():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt()
