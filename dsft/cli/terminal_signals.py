"""Signals that a full screen heeds, as something to wait for: another size, Ctrl-Z, and going on after it."""

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_HEEDED = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
_READ_BYTES = 1024


class SignalWatch:
    """Collects signals in place of what they would do, and wakes who waits on `descriptor`; for the main thread.

    The others, that end the command, wake it too, whatever their handlers do.
    """

    def __init__(self) -> None:
        self._came: set[int] = set()
        self._previous: dict[int, Any] = {}
        self._previous_wakeup = -1
        self._reader = self._writer = -1

    @property
    def descriptor(self) -> int:
        """Becomes readable when a signal comes."""
        return self._reader

    def __enter__(self) -> "SignalWatch":
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _HEEDED:
            # One that is ignored stays so: whoever started this wants no stop, say.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._collect)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def take(self) -> set[int]:
        """Return the signals that came since the last call."""
        with suppress(BlockingIOError):
            while os.read(self._reader, _READ_BYTES):
                pass
        came, self._came = self._came, set()
        return came

    def stop_process(self) -> None:
        """Stop this process as Ctrl-Z does, and return when it goes on."""
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            signal.raise_signal(signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, self._collect)
        self._came.clear()

    def _collect(self, number: int, _frame: FrameType | None) -> None:
        # Of stopping and going on the later one counts.
        self._came -= {signal.SIGTSTP, signal.SIGCONT} if number != signal.SIGWINCH else set()
        self._came.add(number)
