"""Reads the values of simple options at once: typer does it through pydantic, which takes 50 ms and 12 MB to load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

_READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (bool, "yes or no"),
    str: (str, "text"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    Path: (Path, "a path"),
}
"""By its type how a value of an option is read, and what it has to be."""


def read_plainly(parameters: list[Any]) -> list[Any]:
    """Return a command's parameters, so changed that texts, numbers, paths, flags and lists of them are read here."""
    for parameter in parameters:
        if not hasattr(parameter, "get_runtime_param"):
            continue  # this version of typer needs no pydantic
        info, annotation = parameter.type_descriptor.parameter_info, parameter.type_descriptor.annotation
        kind = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        is_limited = any(getattr(info, limit, None) is not None for limit in ("min", "max", "parser", "click_type"))
        if kind in _READERS and not is_limited:
            reader = _Reader(*_READERS[kind])
            parameter.get_runtime_param = lambda reader=reader: reader
    return parameters


class _Reader:
    """Takes the place of typer's own reader of one parameter's values."""

    def __init__(self, read: Callable[[Any], Any], description: str) -> None:
        self._read = read
        self._description = description

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return a value, or a list of them, in its type; nothing given stays so.

        Raises:
            typer.BadParameter: It can't be read so.
        """
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            return [self.coerce(item, param, ctx) for item in value]
        try:
            return self._read(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not {self._description}.", ctx=ctx, param=param) from None
