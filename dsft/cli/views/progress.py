"""Shows a run while it goes on: a live area on a terminal, plain lines elsewhere. Never in the way of the run."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback, to_encodable
from dsft.cli.views.progress_lines import LineChooser, format_event
from dsft.cli.views.progress_panel import render_progress
from dsft.cli.views.progress_state import ProgressState, advance, finish
from dsft.train.events import Event, EventSink, Notice, PlanChanged

REFRESHES_PER_S = 4


class ProgressView:
    """Draws a run's events on a console; `with ProgressView(console) as sink: ...`.

    Losing the screen must not lose the training: once the console can't be written to (a closed pipe, a terminal
    that went away), the view falls silent and the run goes on.

    Args:
        console: Where to draw, usually stderr. FORCE_COLOR makes colours of any file, but no live area.
        clock: Monotonic clock in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._painter: _LivePainter | _LinePainter
        is_live = console.is_interactive and console.file.isatty()
        self._painter = _LivePainter(console, clock) if is_live else _LinePainter(console, clock)
        self._is_started = False
        self._is_lost = False

    def __enter__(self) -> EventSink:
        self._attempt(self._start)
        return self._take

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Tried even when the screen is lost: cursor, stdout and stderr are put back, whatever can still be written.
        if self._is_started:
            with suppress(OSError):
                self._painter.stop(is_failed=kind is not None)

    def _start(self) -> None:
        self._painter.start()
        self._is_started = True

    def _take(self, event: Event, /) -> None:
        self._attempt(lambda: self._painter.take(event))

    def _attempt(self, draw: Callable[[], None]) -> None:
        if self._is_lost:
            return
        try:
            draw()
        except OSError:
            self._is_lost = True


class _LivePainter:
    """Keeps the state and has rich redraw it from its own thread, a few times a second, however fast events come."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        # Replaced as a whole by the training thread and read by the drawing thread: no lock is needed.
        self._state = ProgressState()
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=REFRESHES_PER_S,
            # What other libraries print goes above the live area, unless stdout leads elsewhere.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
            vertical_overflow="crop",
        )

    def start(self) -> None:
        self._live.start()

    def take(self, event: Event) -> None:
        self._state = advance(self._state, event, self._clock())
        if isinstance(event, Notice | PlanChanged):
            style = "dim" if isinstance(event, Notice) and event.level != "warning" else "yellow"
            self._console.print(AsciiFallback(Text(format_event(event), style)))

    def stop(self, *, is_failed: bool) -> None:
        self._state = finish(self._state, self._clock(), is_failed=is_failed)
        self._live.stop()

    def _draw(self) -> RenderableType:
        size = self._console.size
        return AsciiFallback(render_progress(self._state, size.width, size.height, self._clock()))


class _LinePainter:
    """Prints plain lines."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._chooser = LineChooser()

    def start(self) -> None:
        """Nothing to prepare."""

    def take(self, event: Event) -> None:
        self._print(self._chooser.choose(event, self._clock()))

    def stop(self, *, is_failed: bool) -> None:  # the error itself is told by `main`
        self._print(self._chooser.finish())

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(Text(to_encodable(line, self._console.encoding)), soft_wrap=True)
