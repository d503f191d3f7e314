"""Shows a run while it goes on: a live area on a terminal, plain lines elsewhere. Never in the way of the run."""

import sys
import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback, to_encodable
from dsft.cli.views.event_view import EventView, can_redraw
from dsft.cli.views.progress_lines import LineChooser, format_event
from dsft.cli.views.progress_panel import render_progress
from dsft.cli.views.progress_state import ProgressState, advance, finish
from dsft.train.events import Event, Notice, PlanChanged

REFRESHES_PER_S = 4


class ProgressView(EventView[Event]):
    """Draws a run's events on a console; `with ProgressView(console) as sink: ...`.

    Args:
        console: Where to draw, usually stderr.
        clock: Monotonic clock in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(_LivePainter(console, clock) if can_redraw(console) else _LinePainter(console, clock))


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
