"""Writes that go to their end, unless nobody reads any more: then a signal ends them, the second one at once."""

import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.control import Control

from dsft.cli.terminal_keys import is_in_foreground

_PATIENCE_S = 0.4
"""How long a write may still take when a signal has come."""

_LOOK_AGAIN_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StalledError(BaseException):
    """What is written is not taken by its reader, and is not to be waited for any longer."""


@contextmanager
def held_while_written(can_end: Callable[[], bool] = lambda: True, *, limit_s: float | None = None) -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until something is written, but not for ever; then the first takes effect.

    A write that blocks is ended by `StalledError`, raised in its middle, a little after the first signal, and by a
    second one at once.

    Args:
        can_end: Tells whether that may be raised now; asked again a moment later if not.
        limit_s: After how long it is raised without any signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    is_over = False

    def end(*_: object) -> None:
        nonlocal is_over
        if not is_over and can_end():
            is_over = True
            raise StalledError

    def collect(number: int, _frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            end()
        elif limit_s is None:
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S, _LOOK_AGAIN_S)

    handlers = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGALRM)}
    heeded = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    signal.signal(signal.SIGALRM, end)
    for number in _SIGNALS:
        if number in heeded:
            signal.signal(number, collect)
    if limit_s is not None:
        signal.setitimer(signal.ITIMER_REAL, limit_s, _LOOK_AGAIN_S)
    try:
        try:
            yield
        finally:
            is_over = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            if number in heeded or (number == signal.SIGALRM and handler is not None):
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class PatientFile:
    """A terminal as a file that takes frames whole; once one was given up, it takes what comes and writes nothing.

    Args:
        stream: The file on the terminal that this one takes the place of.

    Attributes:
        has_given_up: Whether a write was ended before its end, because nobody read.
        is_writing: Whether a write is going on, which may be ended.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self.encoding, self.errors = stream.encoding, stream.errors or "strict"
        self.has_given_up = self.is_writing = False
        self._descriptor = stream.fileno()
        self._pending: list[str] = []

    def fileno(self) -> int:
        """Return the terminal's descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether it still is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, text: str) -> int:
        """Keep text until the next flush."""
        self._pending.append(text)
        return len(text)

    def flush(self) -> None:
        """Write all that is kept."""
        rest = "".join(self._pending).encode(self.encoding, self.errors)
        self._pending.clear()
        try:
            self.is_writing = True
            while rest and not self.has_given_up:
                rest = rest[os.write(self._descriptor, rest) :]
        except StalledError:
            self.has_given_up = True
        finally:
            self.is_writing = False

    def restore_screen(self) -> None:
        """Where a write was given up, drop what nobody has read, and leave the screen if that can be written at once.

        Not from the background, where the terminal is the shell's.
        """
        if not self.has_given_up or not is_in_foreground(self._descriptor):
            return
        with suppress(OSError, termios.error):
            termios.tcflush(self._descriptor, termios.TCOFLUSH)
            termios.tcflow(self._descriptor, termios.TCOON)  # as Ctrl-C does in a terminal that Ctrl-S had stopped
        with suppress(OSError):  # it went away, or has no room: nothing more can be done
            # Opened once more, because a descriptor that others share must not be made non-blocking.
            terminal = os.open(os.ttyname(self._descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                os.write(terminal, f"{Control.alt_screen(enable=False)}{Control.show_cursor(show=True)}".encode())
            finally:
                os.close(terminal)
