"""The one place that writes to the terminal: for people, as JSON lines, or quietly.

Data goes to stdout, everything else to stderr.
"""

import dataclasses
import errno
import io
import json
import math
import os
import select
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console, RenderableType
from rich.text import Text

if TYPE_CHECKING:
    from dsft.cli.errors import Report

READER_GONE_ERRORS = (BrokenPipeError, ConnectionResetError)
"""What writing raises when nobody reads any more: of a pipe the first, of a socket either."""

_PIPED_WIDTH = 100
"""Columns of a table that is written into a file or pipe."""


class Mode(StrEnum):
    """Whom a command writes for."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class _PipeConsole(Console):
    """A console that lets a closed pipe reach `main`, where rich would end the process with code 1."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error again."""
        raise  # noqa: PLE0704  # rich calls this from its `except BrokenPipeError`


class Output:
    """Writes a command's data and messages.

    Args:
        use_json: One JSON object a line on stdout; nothing for people there.
        is_quiet: Only data, warnings and errors.
    """

    def __init__(self, *, use_json: bool = False, is_quiet: bool = False) -> None:
        self.mode = Mode.JSON if use_json else Mode.QUIET if is_quiet else Mode.HUMAN
        self.stdout = _make_console(is_stderr=False)
        self.stderr = _make_console(is_stderr=True)
        self._has_told_of_escapes = False

    def write(self, text: str, end: str = "\n") -> None:
        """Write data as it is, unwrapped and at once; not in JSON mode, where `emit` carries it."""
        if self.mode is not Mode.JSON:
            self._tell_of_escapes(text)
            with _naming_stdout():
                _write_whole(text + end)

    def show(self, renderable: RenderableType) -> None:
        """Draw a result for people, nothing in the other modes; lines that a view leaves too long stay whole."""
        if self.mode is Mode.HUMAN:
            with _naming_stdout():
                self.stdout.print(renderable, crop=False)

    def answer(self, renderable: RenderableType) -> None:
        """Draw what was asked for, quietly too: it is the data; not in JSON mode, where `emit` carries it."""
        if self.mode is not Mode.JSON:
            with _naming_stdout():
                self.stdout.print(renderable, crop=False)

    def emit(self, record: Mapping[str, Any]) -> None:
        """Write one JSON object on a line of its own; nothing in the other modes."""
        if self.mode is Mode.JSON:
            with _naming_stdout():
                _write_whole(to_json(record) + "\n")

    def note(self, text: str, style: str = "") -> None:
        """Tell people something on stderr; nothing in the other modes."""
        if self.mode is Mode.HUMAN:
            self._tell("", text, style)

    def warn(self, text: str) -> None:
        """Warn on stderr, in every mode."""
        self._tell("warning: ", text, label_style="yellow")

    def alarm(self, text: str, *, is_over: bool) -> None:
        """Tell on stderr, in every mode, that a limit is passed, by the terminal's bell too, or no longer is."""
        if is_over:
            self._tell("alert over: ", text, label_style="green")
            return
        self._tell("alert: ", text, label_style="bold red", rings=True)

    def fail(self, report: "Report", *, is_record: bool = True) -> None:
        """Tell why the command ends, in every mode; in JSON mode, if it is a record, as an object on stdout too."""
        self._tell(f"{report.label}: ", report.found, label_style="bold red")
        if report.fix:
            self._tell("hint: ", report.fix, label_style="cyan")
        if is_record:
            self.emit({"error": report})

    def _tell_of_escapes(self, text: str) -> None:
        """Warn the first time that characters are written as escapes, because stdout's encoding lacks them."""
        encoding = sys.stdout.encoding
        if self._has_told_of_escapes or not encoding:
            return
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            self._has_told_of_escapes = True
            self.warn(
                f"stdout is written in {encoding}, which lacks some characters of the text: they become escapes as "
                "\\u4f60. With PYTHONIOENCODING=utf-8 they come as they are."
            )

    def _tell(self, label: str, text: str, style: str = "", label_style: str = "", *, rings: bool = False) -> None:
        told = label + text
        if self.stderr.file.isatty():  # what is piped stays a line for each message, for those who search in it
            told = _wrap_at_words(told, self.stderr.width)
        message = Text(told, style)
        message.stylize(label_style, 0, len(label))
        try:
            self.stderr.print(message, soft_wrap=True)
            if rings:
                self.stderr.bell()
        except READER_GONE_ERRORS:
            raise
        except OSError:  # a full disk, say: what is told is not what was asked for, and its loss ends nothing
            drop_unwritten(self.stderr.file)


def to_json(value: object) -> str:
    """Return a value as JSON on one line: dataclasses and models as objects, paths as text, NaN as null."""
    return json.dumps(_plain(value), allow_nan=False)


def is_reader_gone() -> bool:
    """Return whether nobody reads stdout or stderr any more."""
    return any(_is_reader_gone(stream) for stream in (sys.stdout, sys.stderr))


def discard_output() -> None:
    """Point stdout and stderr at nothing, so that the interpreter's last flush can't fail on a closed pipe."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_reader_gone(stream):
            os.dup2(devnull, stream.fileno())
    os.close(devnull)


def _make_console(*, is_stderr: bool) -> Console:
    # Text from users and models is never markup. NO_COLOR, FORCE_COLOR and COLUMNS are rich's own business.
    console = _PipeConsole(stderr=is_stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def _wrap_at_words(text: str, width: int) -> str:
    """Return a text in lines of a width; a word that is longer, as a path may be, stays whole."""
    wrapper = textwrap.TextWrapper(
        width, break_long_words=False, break_on_hyphens=False, expand_tabs=False, replace_whitespace=False
    )
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


@contextmanager
def _naming_stdout() -> Iterator[None]:
    """Have an error of writing say where to, as those of files do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or "stdout"
        raise


def _write_whole(text: str) -> None:
    """Write text to stdout at once, and all of it."""
    raw = getattr(sys.stdout, "buffer", None)
    if not isinstance(raw, io.RawIOBase):
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    # With PYTHONUNBUFFERED, as many containers set it, TextIOWrapper drops without a word what is left of a write that
    # a signal or a full disk has cut short.
    rest = text.encode(sys.stdout.encoding, sys.stdout.errors or "strict")
    while rest:
        num_written = raw.write(rest)
        if num_written is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[num_written:]


def drop_unwritten(stream: Any) -> None:
    """Forget what a stream could not write: every later flush, the interpreter's last one too, would fail on it."""
    with suppress(AttributeError, OSError, ValueError):  # not a real file
        descriptor = stream.fileno()
        original, devnull = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(devnull, descriptor)
            stream.flush()
        finally:
            os.dup2(original, descriptor)
            os.close(original)
            os.close(devnull)


def _is_reader_gone(stream: Any) -> bool:
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # closed, None, or not a real file
        return False
    poller = select.poll()
    poller.register(descriptor, 0)  # both are reported unasked: POLLERR of a pipe, POLLHUP of a socket
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    return value
