"""A text file with a mark where something is to be filled in: read to the byte, replaced as a whole or not at all."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.core.errors import InputError, WriteError, describe_os_error
from dsft.core.staging import move_file_in, written_beside

if TYPE_CHECKING:
    from dsft.core.data.prompts import FimPrompt

MARK = "<FILL>"
"""Stands in a file where the gap is."""

MAX_BYTES = 16 * 1024**2
"""A larger file is no source text; its tokens alone would take minutes."""

_STDIN_NAME = Path("-")

_BOM = "\ufeff"


@dataclass(frozen=True)
class MarkedFile:
    """A file with one mark.

    Attributes:
        name: How the user named it.
        path: The file itself, links resolved.
        data: Its bytes.
        before: Its text before the mark.
        behind: Its text behind the mark.
    """

    name: str
    path: Path
    data: bytes
    before: str
    behind: str

    @property
    def has_crlf(self) -> bool:
        """Whether its lines end in CR LF, all of them."""
        num_line_ends = self.data.count(b"\n")
        return num_line_ends > 0 and self.data.count(b"\r\n") == num_line_ends

    @property
    def line(self) -> int:
        """Line of the mark, counted from 1."""
        return self.before.count("\n") + 1

    @property
    def prompt(self) -> "FimPrompt":
        """The gap as models know such texts: without byte order mark, and with LF where all lines end in CR LF."""
        from dsft.core.data.prompts import FimPrompt

        texts = (self.before.removeprefix(_BOM), self.behind)
        before, behind = (text.replace("\r\n", "\n") if self.has_crlf else text for text in texts)
        return FimPrompt(before, behind)

    def fit(self, text: str) -> str:
        """Return a text that a model wrote for `prompt` with the file's own line ends."""
        return text.replace("\r\n", "\n").replace("\n", "\r\n") if self.has_crlf else text

    def check_replaceable(self) -> None:
        """Refuse a file that can't be replaced with all that it is: tried beside it, and removed again.

        Raises:
            InputError: It is so.
        """
        status = None if self.path == _STDIN_NAME else self.path.stat()
        if status is None or not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self.name} is no regular file, so --in-place can't write it.", "Leave --in-place out.")
        if status.st_nlink > 1:
            raise InputError(
                f"{self.name} is one file under {status.st_nlink} names (hard links), and --in-place would part them.",
                "Leave --in-place out, or copy the file first.",
            )
        if not os.access(self.path, os.W_OK):
            raise InputError(f"{self.name} is write-protected.", "Change its rights, or leave --in-place out.")
        try:
            with written_beside(self.path, (), keeps_all=True):
                pass
        except OSError as error:
            raise InputError(
                f"{self.name} can't be replaced as it is: {describe_os_error(error)}.",
                "It needs a folder you can write into, and an owner and group you may give; or leave --in-place out.",
            ) from error

    def replace_mark(self, text: str) -> None:
        """Put a text in the mark's place; the file changes at once as a whole and keeps mode, owner and attributes.

        Raises:
            WriteError: It can't be written, or was changed since it was read; it is as it was found.
        """
        content = f"{self.before}{text}{self.behind}".encode()
        try:
            with written_beside(self.path, (content,), keeps_all=True) as partial:
                if self.path.read_bytes() != self.data:
                    raise WriteError(
                        f"{self.name} was changed while its gap was being filled, so nothing was written into it.",
                        "Put the answer in by hand, or run the command again.",
                    )
                move_file_in(partial, self.path)
        except OSError as error:
            raise WriteError(
                f"{self.name} can't be written: {describe_os_error(error)}.",
                "Put the answer in by hand, or run it again.",
            ) from error


def read_marked_file(path: Path) -> MarkedFile:
    """Read a file with exactly one mark.

    Args:
        path: The file; `-` is stdin. What is no regular file is known by this name alone.

    Raises:
        InputError: It can't be read, is too large or no UTF-8, or has no mark or several.
    """
    try:
        with os.fdopen(0, "rb", closefd=False) if path == _STDIN_NAME else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
            is_regular = path != _STDIN_NAME and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        # Behind the links of a shell's pipe stands nothing that has a name.
        real_path = path.resolve(strict=True) if is_regular else path
    except OSError as error:
        raise InputError(
            f"{path} can't be read: {describe_os_error(error)}.", "Check the file and its rights."
        ) from error
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path} is larger than {MAX_BYTES // 1024**2} MiB.", "Give a file with the part around the gap alone."
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line} is not in UTF-8 (byte 0x{data[error.start]:02x}).",
            "Convert the file, e.g. with: iconv -f LATIN1 -t UTF-8 OLD > NEW",
        ) from None
    before, found, behind = text.partition(MARK)
    if not found:
        raise InputError(f"{path} has no {MARK}{_describe_near(text)}.", f"Write {MARK} where the gap is.")
    if MARK in behind:
        lines = _find_lines(text)
        raise InputError(
            f"{path} has {text.count(MARK)} marks {MARK}, on {_list_lines(lines)}.", "Leave the one to be filled."
        )
    return MarkedFile(str(path), real_path, data, before, behind)


def _find_lines(text: str) -> list[int]:
    return [number for number, line in enumerate(text.split("\n"), 1) if MARK in line]


def _list_lines(lines: list[int]) -> str:
    told = ", ".join(map(str, lines[:10])) + (" and more" if len(lines) > 10 else "")
    return f"line {told}" if len(lines) == 1 else f"lines {told}"


def _describe_near(text: str) -> str:
    """Return where the mark stands in other letters, as the rest of a sentence."""
    near = next((number for number, line in enumerate(text.split("\n"), 1) if MARK in line.upper()), None)
    return "" if near is None else f" (line {near} has it in other letters)"
