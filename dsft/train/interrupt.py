"""Ctrl-C, SIGTERM and SIGHUP: the first asks for an end after the current step, the second ends at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptGuard:
    """Catches termination signals while training runs, and remembers the first.

    The handler only takes a note, because it may run in the middle of a write to the terminal; the training loop
    looks at `signal_name` between micro-batches. Ignored signals stay ignored: nohup relies on it.
    """

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}
        self.signal_name: str | None = None

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; elsewhere (tests, notebooks) there is nothing to catch.
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            return
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
