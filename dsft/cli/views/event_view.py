"""The part of a progress display that knows no command: it is never in the way of the work."""

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from rich.console import Console

EventT = TypeVar("EventT")
_TakenT_contra = TypeVar("_TakenT_contra", contravariant=True)


class Painter(Protocol[_TakenT_contra]):
    """Draws events in one way."""

    def start(self) -> None:
        """Prepare the screen."""
        ...

    def take(self, event: _TakenT_contra) -> None:
        """Draw an event."""
        ...

    def stop(self, *, is_failed: bool) -> None:
        """Draw the end and put the screen right."""
        ...


class EventView(Generic[EventT]):
    """Draws a command's events; `with EventView(painter) as sink: ...`.

    Losing the screen must not lose the work: once it can't be written to (a closed pipe, a terminal that went away),
    the view falls silent and the command goes on.

    Args:
        painter: What draws.
    """

    def __init__(self, painter: Painter[EventT]) -> None:
        self._painter = painter
        self._is_started = False
        self._is_lost = False

    def __enter__(self) -> Callable[[EventT], None]:
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

    def _take(self, event: EventT, /) -> None:
        self._attempt(lambda: self._painter.take(event))

    def _attempt(self, draw: Callable[[], None]) -> None:
        if self._is_lost:
            return
        try:
            draw()
        except OSError:
            self._is_lost = True


def can_redraw(console: Console) -> bool:
    """Return whether a console has a live area; FORCE_COLOR makes colours of any file, but no live area."""
    return console.is_interactive and console.file.isatty()
