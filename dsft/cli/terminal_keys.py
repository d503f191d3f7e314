"""Keys of a terminal one by one, without echo, and its modes put back as they were; draws nothing."""

import errno
import os
import re
import select
import sys
import termios
import time
from contextlib import suppress
from typing import Any

_ESCAPE_WAIT_S = 0.25
"""How long the rest of an escape sequence may take; after that the escape key itself was meant."""

_ESCAPE = "\x1b"
_SEQUENCE = re.compile(r"\x1b(?:\[(?P<parameters>[0-?]*)[ -/]*(?P<csi>[@-~])|O(?P<ss3>[ -~])|(?P<alt>[^\[O\x1b]))")
_BEGUN = re.compile(r"\x1b(?:\[[ -?]*|O)?\Z")
_MAX_SEQUENCE_LENGTH = 32
_READ_BYTES = 1024
_LOCAL_MODES, _CHARACTERS = 3, 6
"""Places in what `termios.tcgetattr` returns."""

_NAMES_BY_LETTER = {"A": "up", "B": "down", "H": "home", "F": "end"}
_NAMES_BY_NUMBER = {"1": "home", "7": "home", "4": "end", "8": "end", "5": "page_up", "6": "page_down"}


class KeyParser:
    """Makes keys of what a terminal sends: characters, and names for arrows and the like."""

    def __init__(self) -> None:
        self._pending = ""

    @property
    def is_waiting(self) -> bool:
        """Whether an escape sequence, or the escape key alone, has begun."""
        return bool(self._pending)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys that are complete; the rest waits for more."""
        text = self._pending + data.decode("latin-1")  # all that is a key here is ASCII
        self._pending = ""
        keys = []
        while text:
            if text[0] != _ESCAPE:
                keys.append(text[0])
                text = text[1:]
                continue
            sequence = _SEQUENCE.match(text)
            if sequence is not None:
                name = _name(sequence)
                keys += [name] if name else []
                text = text[sequence.end() :]
            elif _BEGUN.match(text) and len(text) <= _MAX_SEQUENCE_LENGTH:
                self._pending, text = text, ""
            else:  # two escapes: some terminals put one before an arrow that is typed with Alt
                text = text[1:]
        return keys

    def give_up(self) -> list[str]:
        """Return what is meant by what has come, when nothing follows: the escape key, or nothing."""
        pending, self._pending = self._pending, ""
        return ["escape"] if pending == _ESCAPE else []


class Keyboard:
    """The keys of a terminal, and its modes.

    Args:
        descriptor: Of the terminal; None where there is none, and no keys.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._saved: list[Any] | None = None
        self._parser = KeyParser()
        self._waits_until_s: float | None = None

    @property
    def has_keys(self) -> bool:
        """Whether there is a terminal to read keys from."""
        return self._descriptor is not None

    @property
    def descriptor(self) -> int | None:
        """What to wait for keys on; None while there is nothing to be read, or it would stop the process."""
        return self._descriptor if self._saved is not None and self._is_in_foreground() else None

    @property
    def waits_until_s(self) -> float | None:
        """Until when a key that has begun may be completed, on the monotonic clock; None where none has begun."""
        return self._waits_until_s

    def enter(self) -> None:
        """Have keys come at once and without echo; from the background this stops the process until `fg`.

        A second call sets the modes again, in case they were changed, and still remembers the first ones.
        """
        if self._descriptor is None:
            return
        try:
            if self._saved is None:
                self._saved = termios.tcgetattr(self._descriptor)
            modes: list[Any] = [*self._saved]
            modes[_CHARACTERS] = list(modes[_CHARACTERS])
            modes[_LOCAL_MODES] &= ~(termios.ICANON | termios.ECHO)
            modes[_CHARACTERS][termios.VMIN], modes[_CHARACTERS][termios.VTIME] = 1, 0
            self._set(modes)
        except termios.error:  # it went away, or belongs to others for good: no keys, then
            self._descriptor = self._saved = None

    def leave(self, *, waits: bool = True) -> None:
        """Put the terminal's modes back; not from the background, where the modes are the shell's.

        Args:
            waits: Whether what is written is to come out first.
        """
        if self._descriptor is None or self._saved is None:
            return
        if self._is_in_foreground():
            with suppress(termios.error):  # it went away
                self._set(self._saved, termios.TCSADRAIN if waits else termios.TCSANOW)
        self._saved = None

    def read(self) -> list[str]:
        """Return the keys that have come, without waiting.

        Raises:
            EOFError: The terminal went away.
        """
        descriptor = self.descriptor
        if descriptor is None or not select.select([descriptor], [], [], 0)[0]:
            return []
        try:
            data = os.read(descriptor, _READ_BYTES)
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        keys = self._parser.feed(data)
        self._waits_until_s = time.monotonic() + _ESCAPE_WAIT_S if self._parser.is_waiting else None
        return keys

    def give_up(self) -> list[str]:
        """Return what a key that has begun means, where nothing has followed in time."""
        if self._waits_until_s is None or time.monotonic() < self._waits_until_s:
            return []
        self._waits_until_s = None
        return self._parser.give_up()

    def _set(self, modes: list[Any], when: int = termios.TCSADRAIN) -> None:
        if self._descriptor is None:
            return
        while True:
            try:
                termios.tcsetattr(self._descriptor, when, modes)
            except termios.error as error:
                if error.args[0] != errno.EINTR:  # else a signal came, the one that ended a stop say
                    raise
            else:
                return

    def _is_in_foreground(self) -> bool:
        if self._descriptor is None:
            return False
        return is_in_foreground(self._descriptor)


def is_in_foreground(descriptor: int) -> bool:
    """Return whether a terminal may be read and changed without this process being stopped for it."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # not the terminal that controls this process: that may be done any time
        return True


def find_keyboard() -> Keyboard:
    """Return the keyboard on stdin, without keys where that is no terminal."""
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or not a real file
        return Keyboard(None)
    return Keyboard(descriptor if os.isatty(descriptor) else None)


def _name(sequence: re.Match[str]) -> str | None:
    letter = sequence["csi"] or sequence["ss3"]
    if letter == "~":
        return _NAMES_BY_NUMBER.get(sequence["parameters"].partition(";")[0])
    return _NAMES_BY_LETTER.get(letter or "")
