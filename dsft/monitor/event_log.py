"""Follows the event log of a training run: what still matters when it is opened, and then what is new.

A log is JSON lines of the form `{"event": KIND, "time": ISO 8601, ...}`, as `dsft train` writes them.
"""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

Event = dict[str, Any]

NUM_STEPS_KEPT = 64
"""Newest steps that are read of a log that is opened."""

_BLOCK_BYTES = 256 * 1024
_LONGEST_LINE_BYTES = 1024 * 1024
_KIND_PREFIX = b'{"event": "'
_STARTED = _KIND_PREFIX + b'RunStarted"'
_ENDED = _KIND_PREFIX + b'RunEnded"'
_IS_BEST = b'"is_best": true'


@dataclass(frozen=True)
class NewEvents:
    """What a log told since it was last read.

    Attributes:
        events: In the order they were told.
        begins_anew: Whether what it told before is void.
    """

    events: list[Event] = field(default_factory=list)
    begins_anew: bool = False


class EventLog:
    """Follows one log, and another that takes its place.

    Args:
        path: The log, which may not be there yet.
        since_s: When the run was begun that it is followed for, in seconds since the epoch: a resumed run appends to
            the log of earlier processes.
    """

    def __init__(self, path: Path, since_s: float) -> None:
        self._path = str(path)
        self._since_s = since_s
        self._file: int | None = None
        self._size_bytes = 0
        self._end = 0  # of the last whole line

    def close(self) -> None:
        """Close the log."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def read(self) -> NewEvents:
        """Return what is new.

        Raises:
            FileNotFoundError: There is no log yet.
            OSError: It can't be read.
        """
        if self._file is None or self._is_replaced(self._file):
            return self._begin(self._open())
        size_bytes = os.fstat(self._file).st_size
        if size_bytes == self._size_bytes:
            return NewEvents()
        if not self._end <= size_bytes <= self._end + _BLOCK_BYTES:  # truncated, or more than has to be gone through
            return self._begin(self._file)
        content = os.pread(self._file, size_bytes - self._end, self._end)
        lines = content[: content.rfind(b"\n") + 1].split(b"\n")
        if any(line.startswith(_STARTED) for line in lines):
            return self._begin(self._file)
        self._size_bytes = size_bytes
        self._end += content.rfind(b"\n") + 1
        return NewEvents([event for line in lines if line and (event := _parse(line)) is not None])

    def _open(self) -> int:
        file = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe there must not stop the reader
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(f"{self._path} is no file")
        self.close()
        self._file = file
        return file

    def _is_replaced(self, file: int) -> bool:
        try:
            # The open file keeps its inode's number from being given to another.
            return not os.path.samestat(os.stat(self._path), os.fstat(file))  # noqa: PTH116  # each second
        except FileNotFoundError:
            return False  # its process goes on writing into it

    def _begin(self, file: int) -> NewEvents:
        self._size_bytes = os.fstat(file).st_size
        lines = _lines_backwards(file, self._size_bytes)
        self._end = self._size_bytes - len(next(lines))  # less a line that is being written
        return NewEvents(_choose(lines, self._since_s), begins_anew=True)


def read_time_s(event: Event) -> float | None:
    """Return when an event was told, in seconds since the epoch; None where it does not say."""
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _choose(lines: Iterator[bytes], since_s: float) -> list[Event]:
    """Return the events of a run that its state can be told from, without parsing the others.

    Args:
        lines: All lines, the newest first.
        since_s: When the run was begun.
    """
    wanted = dict.fromkeys(("Validated", "PlanChanged", "CheckpointSaved", "InterruptRequested", "Phase"), 1)
    wanted["StepDone"] = NUM_STEPS_KEPT
    chosen: list[bytes] = []
    has_best = False
    for line in lines:
        if line.startswith(_STARTED):
            chosen.append(line)
            break
        kind = _kind(line)
        is_best = not has_best and _is_best(line)
        if wanted.get(kind, 0) > 0 or is_best or (not chosen and kind):  # the newest tells when it last told anything
            wanted[kind] = wanted.get(kind, 0) - 1
            has_best |= is_best
            chosen.append(line)
    else:
        return _choose_end(chosen, since_s)
    started = _parse(chosen[-1])
    started_s = read_time_s(started) if started is not None else None
    if started is None or started_s is None or started_s < since_s:
        return _choose_end(chosen, since_s)
    if not has_best and started.get("first_step"):
        chosen += next(([line] for line in lines if _is_best(line)), [])
    return [event for line in reversed(chosen) if (event := _parse(line)) is not None]


def _choose_end(lines: list[bytes], since_s: float) -> list[Event]:
    """Return the end of a run that failed before its first step; what stands before it is an earlier run's.

    Args:
        lines: The newest first.
        since_s: When the run was begun.
    """
    newest = _parse(lines[0]) if lines and lines[0].startswith(_ENDED) else None
    return [newest] if newest is not None and (read_time_s(newest) or 0.0) >= since_s else []


def _lines_backwards(file: int, end: int) -> Iterator[bytes]:
    """Yield the lines of a file from the last to the first; what follows the last line feed comes first."""
    rest = b""
    while end > 0 and len(rest) <= _LONGEST_LINE_BYTES:
        start = max(0, end - _BLOCK_BYTES)
        rest, *lines = (os.pread(file, end - start, start) + rest).split(b"\n")
        yield from reversed(lines)
        end = start
    yield rest


def _kind(line: bytes) -> str:
    if not line.startswith(_KIND_PREFIX):
        return ""
    return line[len(_KIND_PREFIX) : line.find(b'"', len(_KIND_PREFIX))].decode("ascii", "replace")


def _is_best(line: bytes) -> bool:
    return line.startswith(_KIND_PREFIX + b"Validated") and _IS_BEST in line


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
