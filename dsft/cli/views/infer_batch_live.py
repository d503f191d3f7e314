"""Shows a batch while it goes on: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from dsft.cli.views.event_view import EventView, can_redraw
from dsft.cli.views.infer_batch import BatchState, advance, format_line, render_state
from dsft.infer.batch_events import BatchProgress

_REFRESHES_PER_S = 4

_LINE_INTERVAL_S = 10.0


def open_batch_view(console: Console, clock: Callable[[], float] = time.monotonic) -> EventView[BatchProgress]:
    """Return what shows a batch on a console; as a context it gives the sink of its progress.

    Args:
        console: Where to draw, usually stderr.
        clock: Monotonic clock in seconds.
    """
    if can_redraw(console):
        return EventView(_BarPainter(console, clock))
    return EventView(_LinePainter(console, clock))


class _BarPainter:
    """Has rich redraw the newest progress from its own thread; at the end the bar makes room for the summary."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        # Replaced as a whole by the working thread and read by the drawing thread: no lock is needed.
        self._state: BatchState | None = None
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            # What other libraries print goes above the bar, unless stdout leads elsewhere.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
        )

    def start(self) -> None:
        self._live.start()

    def take(self, event: BatchProgress) -> None:
        self._state = advance(self._state, event, self._clock())

    def stop(self, *, is_failed: bool) -> None:
        self._live.stop()

    def _draw(self) -> RenderableType:
        return render_state(self._state, self._console.width, self._clock())


class _LinePainter:
    """Prints a line when some seconds have passed since the last one; a short batch has none but its summary."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._state: BatchState | None = None
        self._told_s = clock()

    def start(self) -> None:
        """Nothing to prepare."""

    def take(self, event: BatchProgress) -> None:
        now_s = self._clock()
        is_first = self._state is None
        self._state = advance(self._state, event, now_s)
        if is_first:
            self._told_s = now_s
        elif now_s - self._told_s >= _LINE_INTERVAL_S:
            self._told_s = now_s
            self._console.print(Text(format_line(self._state, now_s)), soft_wrap=True)

    def stop(self, *, is_failed: bool) -> None:
        """Nothing is left to tell: the summary or the error follows."""
