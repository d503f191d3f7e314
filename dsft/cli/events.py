"""What a command tells while it runs, as JSON objects, and to a reader that may be gone."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

_EventT = TypeVar("_EventT")


def outlive_reader(write: Callable[[_EventT], None]) -> Callable[[_EventT], None]:
    """Fall silent once nothing can be written any more, as the live displays do: the work itself goes on."""
    is_lost = False

    def sink(event: _EventT) -> None:
        nonlocal is_lost
        if not is_lost:
            try:
                write(event)
            except OSError:
                is_lost = True

    return sink


def make_record(message: Any) -> dict[str, Any]:
    """Return an event or result as a JSON object that starts with its class's name."""
    return {"event": type(message).__name__} | {field.name: getattr(message, field.name) for field in fields(message)}
