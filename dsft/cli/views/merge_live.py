"""Shows a merge while it goes on: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback, to_encodable
from dsft.cli.views.event_view import EventView, can_redraw
from dsft.cli.views.merge_progress import (
    PhaseProgress,
    ProgressChooser,
    advance,
    format_line,
    format_notice,
    render_phases,
)
from dsft.merge.events import Notice, Progress

_REFRESHES_PER_S = 4

_LINE_INTERVAL_S = 5.0


def open_merge_view(console: Console, clock: Callable[[], float] = time.monotonic) -> EventView[Notice | Progress]:
    """Return what shows a merge on a console; as a context it gives the sink of its events.

    Args:
        console: Where to draw, usually stderr.
        clock: Monotonic clock in seconds.
    """
    if can_redraw(console):
        return EventView(_BarPainter(console, clock))
    return EventView(_LinePainter(console, clock))


class _BarPainter:
    """Keeps the phases and has rich redraw them from its own thread; at the end they make room for the summary."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        # Replaced as a whole by the merging thread and read by the drawing thread: no lock is needed.
        self._phases: tuple[PhaseProgress, ...] = ()
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            # What other libraries print goes above the bars, unless stdout leads elsewhere.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
        )

    def start(self) -> None:
        self._live.start()

    def take(self, event: Notice | Progress) -> None:
        if isinstance(event, Notice):
            style = "yellow" if event.level == "warning" else "dim"
            self._console.print(AsciiFallback(Text(format_notice(event), style)))
        else:
            self._phases = advance(self._phases, event, self._clock())

    def stop(self, *, is_failed: bool) -> None:
        self._live.stop()

    def _draw(self) -> RenderableType:
        return render_phases(self._phases, self._console.width, self._clock())


class _LinePainter:
    """Prints plain lines."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._chooser = ProgressChooser(_LINE_INTERVAL_S)
        self._phases: tuple[PhaseProgress, ...] = ()

    def start(self) -> None:
        """Nothing to prepare."""

    def take(self, event: Notice | Progress) -> None:
        if isinstance(event, Notice):
            self._print(format_notice(event))
            return
        now_s = self._clock()
        told = self._chooser.choose(event, now_s)
        if told[:-1]:  # the last of the phase before, which ended short of its total
            self._print(format_line(self._phases[-1], now_s))
        self._phases = advance(self._phases, event, now_s)
        if told:
            self._print(format_line(self._phases[-1], now_s))

    def stop(self, *, is_failed: bool) -> None:  # the error itself is told by `main`
        if self._chooser.finish():
            self._print(format_line(self._phases[-1], self._clock()))

    def _print(self, line: str) -> None:
        self._console.print(Text(to_encodable(line, self._console.encoding)), soft_wrap=True)
