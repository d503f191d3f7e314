"""Reads the values of simple options at once: typer does it through pydantic, which takes 50 ms and 12 MB to load.

What is not plain in every respect, an option or a text, is left to typer, so that nothing is read differently here.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(?:[eE][+-]?[0-9]{1,3})?")

_PLAIN_SETTINGS: dict[str, Any] = {
    "parser": None, "click_type": None, "envvar": None, "min": None, "max": None, "clamp": False, "formats": None,
    "case_sensitive": True, "mode": None, "encoding": None, "errors": "strict", "lazy": None, "atomic": False,
    "exists": False, "file_okay": True, "dir_okay": True, "writable": False, "readable": True, "resolve_path": False,
    "allow_dash": False, "path_type": None,
}  # fmt: skip
"""Of an option: what changes how its value is read, and by which setting it does not."""

_OTHER_SETTINGS = frozenset({
    "default", "param_decls", "callback", "metavar", "expose_value", "is_eager", "shell_complete", "autocompletion",
    "default_factory", "show_default", "show_choices", "show_envvar", "help", "hidden", "rich_help_panel", "prompt",
    "confirmation_prompt", "prompt_required", "hide_input", "is_flag", "flag_value", "count", "allow_from_autoenv",
})  # fmt: skip
"""What does not change it."""


class _NotPlainError(Exception):
    """This value is typer's business."""


def read_plainly(parameters: list[Any]) -> list[Any]:
    """Return a command's parameters, so changed that texts, numbers, paths, flags and lists of them are read here."""
    for parameter in parameters:
        descriptor = getattr(parameter, "type_descriptor", None)
        info, annotation = getattr(descriptor, "parameter_info", None), getattr(descriptor, "annotation", None)
        arguments = get_args(annotation)
        kind = arguments[0] if get_origin(annotation) is list and len(arguments) == 1 else annotation
        ask_typer = getattr(parameter, "get_runtime_param", None)
        # A version of typer that has none of this needs no pydantic.
        if kind not in _READERS or info is None or ask_typer is None or isinstance(ask_typer, _PlainReader):
            continue
        if _is_plain(info):
            parameter.get_runtime_param = _PlainReader(_READERS[kind], parameter, ask_typer)
    return parameters


def _is_plain(info: Any) -> bool:
    settings = getattr(info, "__dict__", None)
    if settings is None or not settings.keys() <= _PLAIN_SETTINGS.keys() | _OTHER_SETTINGS:
        return False
    return all(settings.get(name, plain) == plain for name, plain in _PLAIN_SETTINGS.items())


class _PlainReader:
    """Takes the place of typer's own reader of one parameter's values, and of what gives it."""

    def __init__(self, read: Callable[[Any], Any], parameter: Any, ask_typer: Callable[[], Any]) -> None:
        self._read = read
        self._is_multiple = bool(getattr(parameter, "multiple", False)) or getattr(parameter, "nargs", 1) == -1
        self._ask_typer = ask_typer

    def __call__(self) -> "_PlainReader":
        return self

    def coerce(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a value, or a list of them, in its type; nothing given stays so.

        Raises:
            typer.BadParameter: It can't be read so.
        """
        if value is None:
            return () if self._is_multiple else None
        try:
            if not self._is_multiple:
                return self._read(value)
            if isinstance(value, (list, tuple)):
                return [self._read(item) for item in value]
        except _NotPlainError:
            pass
        return self._ask_typer().coerce(value, *args, **kwargs)


def _read_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _NotPlainError


def _read_text(value: Any) -> str:
    if isinstance(value, str) and _is_unicode(value):
        return value
    raise _NotPlainError


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # from bytes of a command line that are no UTF-8
        return False
    return True


def _read_integer(value: Any) -> int:
    if type(value) is int or (isinstance(value, str) and _INTEGER.fullmatch(value)):
        return int(value)
    raise _NotPlainError


def _read_number(value: Any) -> float:
    if type(value) is float or (isinstance(value, str) and _NUMBER.fullmatch(value)):
        return float(value)
    raise _NotPlainError


def _read_path(value: Any) -> Path:
    # One that is there and can't be read is refused by typer.
    if isinstance(value, (str, Path)) and (not os.path.exists(value) or os.access(value, os.R_OK)):  # noqa: PTH110
        return Path(value)
    raise _NotPlainError


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _read_flag,
    str: _read_text,
    int: _read_integer,
    float: _read_number,
    Path: _read_path,
}
"""By its type how a plain value of an option is read."""
