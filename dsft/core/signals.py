"""Holding termination signals back while they would do harm."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held_signals() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back, and let the first that came take effect at the end.

    For the import of large libraries: an exception in the middle of one is lost in a destructor, or ends the process
    where compiled code does not expect it. A signal mask would not do: it holds for one thread, and the handler runs
    in the main thread whichever takes the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    heeded = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in heeded:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
