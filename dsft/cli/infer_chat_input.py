"""What is typed or piped into a chat: lines with or without a terminal, and what of them is one question or command."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from dsft.core.errors import InputError

PROMPT, CONTINUED_PROMPT = ">>> ", "... "

BLOCK_MARK = '"""'

ReadLine = Callable[[bool], str]
"""Returns the next line without its line end, told whether it goes on with a question; EOFError where there is none."""


@dataclass(frozen=True)
class Unit:
    """What belongs together.

    Attributes:
        text: One or several lines.
        is_block: Whether it stood between marks, so that it is text whatever it looks like.
    """

    text: str
    is_block: bool = False


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash.

    Attributes:
        name: With the slash.
        argument: What follows; empty where nothing does.
    """

    name: str
    argument: str


class BadLineError(InputError):
    """A line is no text, but where it ends is known, so that what belongs to it can be read to its end.

    Attributes:
        text: The line with signs in place of what is no text.
    """

    def __init__(self, found: str, fix: str, text: str) -> None:
        super().__init__(found, fix)
        self.text = text


def read_unit(read_line: ReadLine) -> Unit:
    r"""Read the next question or command: a line, lines that end in `\`, a block between marks, or a paste.

    Raises:
        BadLineError: One of its lines is no text; none of them is left to be taken for another question.
        EOFError: There is nothing more; what was begun before the end counts.
    """
    errors: list[BadLineError] = []

    def read_any(is_continued: bool) -> str:
        try:
            return read_line(is_continued)
        except BadLineError as error:
            errors.append(error)
            return error.text

    unit = _join_lines(read_any)
    if errors:
        raise errors[0]
    return unit


def _join_lines(read_line: ReadLine) -> Unit:
    line = read_line(False)
    if line.rstrip() == BLOCK_MARK:
        return Unit("\n".join(_read_block(read_line)), is_block=True)
    # A terminal gives several lines at once where they were pasted.
    pasted = line.removesuffix("\n").split("\n")
    if len(pasted) > 1 and pasted[0].rstrip() == pasted[-1].rstrip() == BLOCK_MARK:
        return Unit("\n".join(pasted[1:-1]), is_block=True)
    lines = ["\n".join(pasted)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read_line(True))
        except EOFError:
            break
    return Unit("\n".join(lines))


def _read_block(read_line: ReadLine) -> Iterator[str]:
    while True:
        try:
            *lines, last = read_line(True).split("\n")
        except EOFError:
            return
        yield from lines
        if last.rstrip() == BLOCK_MARK:
            return
        yield last


def parse_unit(unit: Unit, command_names: Sequence[str]) -> Command | str:
    """Return a command, or the text of a question.

    Several lines are a command only if they begin with the name of one, because code may begin with a slash.
    """
    text = unit.text
    if unit.is_block or not text.startswith("/"):
        return text
    name = text.split(maxsplit=1)[0]
    if "\n" in text.rstrip() and name not in command_names:
        return text
    if text.startswith("//"):
        return text[1:]
    return Command(name, text[len(name) :].strip())


class Lines(Protocol):
    """Where lines come from."""

    @property
    def is_interactive(self) -> bool:
        """Whether someone types them."""

    def read(self, is_continued: bool) -> str:
        """Return the next line; see `ReadLine`."""

    def has_typed(self) -> bool:
        """Return whether an interrupt came behind the beginning of a line."""


class TerminalLines:
    """Lines edited on a terminal, with a history of this process.

    Args:
        command_names: What the tabulator completes.
        is_bold: Whether the prompt may be drawn bold.
    """

    is_interactive = True

    def __init__(self, command_names: Sequence[str], *, is_bold: bool) -> None:
        self._command_names = command_names
        self._is_bold = is_bold
        self._readline = _find_readline()
        self._ends_line_at_eof = False
        self._is_begun = False
        if self._readline is not None:
            self._set_up(self._readline)

    def read(self, is_continued: bool) -> str:
        """Return the next line, or the lines that were pasted; see `ReadLine`.

        Raises:
            InputError: It is not in the terminal's encoding.
        """
        self._is_begun = is_continued
        try:
            with _stdout_on_stderr():
                return input(self._draw(CONTINUED_PROMPT if is_continued else PROMPT))
        except UnicodeDecodeError as error:
            raise InputError(
                f"The line is not valid {error.encoding.upper()} at byte {error.start + 1}.", "Type it again."
            ) from None
        except EOFError:
            if not self._ends_line_at_eof:
                sys.stderr.write("\n")
            raise

    def has_typed(self) -> bool:
        """Return whether an interrupt came behind the beginning of a question."""
        return self._is_begun or (self._readline is not None and bool(self._readline.get_line_buffer()))

    def _set_up(self, readline: ModuleType) -> None:
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
            return
        readline.parse_and_bind("tab: complete")
        if os.environ.get("TERM", "dumb") != "dumb":
            # Several lines that are pasted then come as one. GNU readline ends the line by itself at the end of the
            # input where this is on.
            readline.parse_and_bind("set enable-bracketed-paste on")
            self._ends_line_at_eof = True

    def _complete(self, text: str, state: int) -> str | None:
        is_name = text.startswith("/") and self._readline is not None and self._readline.get_begidx() == 0
        names = [name for name in self._command_names if name.startswith(text)] if is_name else []
        return names[state] if state < len(names) else None

    def _draw(self, prompt: str) -> str:
        if not self._is_bold:
            return prompt
        if self._readline is None:
            return f"\x1b[1m{prompt}\x1b[0m"
        return f"\x01\x1b[1m\x02{prompt}\x01\x1b[0m\x02"  # readline does not count what stands between \1 and \2


class PlainLines:
    """Lines of stdin as they come, without a prompt: from a file, a pipe, or where nothing shows what is typed.

    Attributes:
        is_interactive: Whether stdin is a terminal all the same.
    """

    def __init__(self, *, is_interactive: bool) -> None:
        self.is_interactive = is_interactive

    def read(self, is_continued: bool) -> str:
        """Return the next line; see `ReadLine`.

        Raises:
            BadLineError: It is not UTF-8.
        """
        line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadLineError(
                f"The line on stdin is not valid UTF-8 at byte {error.start + 1}.",
                "Give it in the UTF-8 encoding.",
                line.decode("utf-8", "replace"),
            ) from None

    def has_typed(self) -> bool:
        """Return False: what a terminal holds of a line can't be seen."""
        return False


def open_lines(command_names: Sequence[str], *, is_bold: bool) -> TerminalLines | PlainLines:
    """Return where a chat's lines come from."""
    is_interactive = sys.stdin is not None and sys.stdin.isatty()
    if is_interactive and (sys.stderr.isatty() or sys.stdout.isatty()):
        return TerminalLines(command_names, is_bold=is_bold)
    return PlainLines(is_interactive=is_interactive)


def _find_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # some builds of Python lack it; lines are then edited by the terminal
        return None
    return readline


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Let what is written to the process's stdout go to stderr's terminal, where it is one.

    `input` edits lines on stdout alone, but stdout is the answers' and may be a file or a pipe.
    """
    if not sys.stderr.isatty():
        yield
        return
    sys.stdout.flush()
    descriptor = sys.stdout.fileno()
    kept = os.dup(descriptor)
    try:
        os.dup2(sys.stderr.fileno(), descriptor)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
