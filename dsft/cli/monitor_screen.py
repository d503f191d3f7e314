"""The live screen of `dsft monitor`: samples, keys and signals in one loop, and the terminal as it was afterwards."""

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console
from rich.live import Live

from dsft.cli.output import Output, discard_output, is_reader_gone
from dsft.cli.terminal_keys import Keyboard, find_keyboard
from dsft.cli.terminal_signals import SignalWatch
from dsft.cli.terminal_writes import PatientFile, held_while_written
from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.monitor.layout import draw_screen
from dsft.cli.views.monitor.line import Rows
from dsft.cli.views.monitor.state import MonitorState
from dsft.core.signals import held_signals
from dsft.monitor.config import MonitorConfig
from dsft.monitor.run import Schedule
from dsft.monitor.sample import Sample
from dsft.monitor.sampler import ReadsSamples

_QUIT_KEYS = frozenset({"q", "escape"})

_LEAVE_S = 0.4
"""How long the terminal may take to take the last that is written to it."""


def run_screen(
    output: Output, config: MonitorConfig, sampler: ReadsSamples, on_sample: Callable[[Sample], None]
) -> Sample:
    """Show samples until q is pressed, the duration is over, or the terminal goes away.

    Args:
        output: On its stdout, a terminal, the screen is drawn.
        config: Interval and duration.
        sampler: Reads samples; between two of them nothing is done.
        on_sample: Takes each of them, once, while the screen stands still too.

    Returns:
        The last sample.

    Raises:
        ConfigError: A GPU that was asked for is not there.
    """
    schedule = Schedule(config)
    sample = sampler.read()
    on_sample(sample)
    with (
        _written_whole(output.stdout) as terminal,
        SignalWatch() as signals,
        _Screen(output.stdout, terminal, config.interval_s, signals) as screen,
    ):
        screen.take(sample)
        while True:
            goes_on = schedule.advance()
            if not screen.wait(schedule.due_s) or not goes_on:
                return sample
            sample = sampler.read()
            on_sample(sample)
            screen.take(sample)


@contextmanager
def _written_whole(console: Console) -> Iterator[PatientFile]:
    """Have all of a frame written, also with PYTHONUNBUFFERED, where a signal cuts a write short without a word."""
    stream = console.file
    terminal = PatientFile(cast("TextIO", stream))
    console.file = cast("TextIO", terminal)  # all of it that rich uses is there
    try:
        yield terminal
    finally:
        console.file = stream


class _Screen:
    """The terminal while it is drawn on.

    Args:
        console: Where.
        terminal: The console's file.
        interval_s: Time between samples.
        signals: Tells of another size and of stops.
    """

    def __init__(self, console: Console, terminal: PatientFile, interval_s: float, signals: SignalWatch) -> None:
        self._console = console
        self._terminal = terminal
        self._signals = signals
        self._keyboard: Keyboard = find_keyboard()
        self._state = MonitorState(interval_s, has_keys=self._keyboard.has_keys, host_name=socket.gethostname())
        self._num_processes = self._num_shown = 0
        self._is_gone = False
        self._live = Live(
            console=console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            # What libraries print is not to break the screen, unless stderr leads elsewhere.
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )

    def __enter__(self) -> "_Screen":
        try:
            self._enter()
        except BaseException:
            self._leave_whatever_comes()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_whatever_comes()

    def take(self, sample: Sample) -> None:
        """Show a sample, and ring when an alert begins to fire with it."""
        before, unknown_before = self._state.newest, self._state.unknown_alerts
        has_begun = self._state.take(sample)
        if has_begun:
            self._attempt(self._console.bell)
        # Alerts go on while the figures stand still.
        is_other = before is None or before.alerts != sample.alerts or unknown_before != self._state.unknown_alerts
        if is_other or not self._state.is_paused:
            self._draw()

    def wait(self, due_s: float) -> bool:
        """Heed keys and signals until a time; returns False when the screen is to end.

        Args:
            due_s: Of the next sample, on the monotonic clock.
        """
        while not self._is_gone:
            timeout_s = max(0.0, due_s - time.monotonic())
            keys_come_on = self._keyboard.descriptor
            if self._keyboard.waits_until_s is not None:
                timeout_s = max(0.0, min(due_s, self._keyboard.waits_until_s) - time.monotonic())
            watched = [self._signals.descriptor, *([] if keys_come_on is None else [keys_come_on])]
            ready, _, _ = select.select(watched, [], [], timeout_s)
            if self._signals.descriptor in ready:
                self._heed_signals()
            try:
                keys = self._keyboard.read() if keys_come_on in ready else []
            except EOFError:
                self._is_gone = True
                break
            if not self._press(keys + self._keyboard.give_up()):
                return False
            if time.monotonic() >= due_s:
                break
        return not self._is_gone

    def _press(self, keys: list[str]) -> bool:
        is_changed = False
        for key in keys:
            if key in _QUIT_KEYS and not self._state.shows_help:
                return False
            is_changed |= self._state.press(key, self._num_processes, self._num_shown)
        if is_changed:
            self._draw()
        return True

    def _heed_signals(self) -> None:
        came = self._signals.take()
        if signal.SIGTSTP in came:
            self._leave()
            self._signals.stop_process()
            self._enter()
        elif signal.SIGCONT in came:  # after a stop that could not be prepared for: the shell had the terminal
            self._attempt(self._live.stop)
            self._enter()
        if came:
            self._draw()

    def _draw(self) -> None:
        width, height = self._find_size()
        frame = draw_screen(self._state, width, height)
        self._num_processes, self._num_shown = frame.num_processes, frame.num_shown
        rows = AsciiFallback(Rows(frame.lines))
        self._attempt(lambda: self._live.update(rows, refresh=True))

    def _find_size(self) -> tuple[int, int]:
        with suppress(AttributeError, OSError, ValueError):
            width, height = os.get_terminal_size(self._console.file.fileno())
            if width > 0 and height > 0:
                # Rich would believe COLUMNS and LINES, which stay what they are when the window changes.
                self._console.size = (width, height)
        return self._console.width, self._console.height

    def _enter(self) -> None:
        self._keyboard.enter()
        self._terminal.has_given_up = False
        self._attempt(self._live.start)

    def _leave_whatever_comes(self) -> None:
        try:
            self._leave()
        except BaseException:  # a second Ctrl-C, say, before signals were held back
            self._leave()
            raise

    def _leave(self) -> None:
        with held_signals():
            try:
                self._attempt(self._live.stop, limit_s=_LEAVE_S)
            finally:
                self._terminal.restore_screen()
                self._keyboard.leave(waits=not self._terminal.has_given_up)

    def _attempt(self, write: Callable[[], None], limit_s: float | None = None) -> None:
        """Write to the terminal, whole if it is read; that it went away ends the screen and is no error."""
        try:
            with held_while_written(lambda: self._terminal.is_writing, limit_s=limit_s):
                write()
        except OSError:
            if not is_reader_gone():
                raise
            self._is_gone = True
            discard_output()
