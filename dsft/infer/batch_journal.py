"""What keeps a batch's answers while it runs: a file beside the output that each answer is appended to at once.

A process that goes on finds there what is done; the output itself appears at the end, whole and in order.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsft.core.errors import ConfigError, InputError, OutputFolderError, WriteError, describe_os_error
from dsft.core.signals import held_signals
from dsft.core.staging import move_file_in, written_beside

_VERSION = 1


def check_output(output: Path) -> None:
    """Refuse a name for the answers that is taken, or whose folder is not there.

    Raises:
        ConfigError: It is so.
    """
    if output.is_dir():
        raise ConfigError(f"--output: {output} is a folder.", "Name a file in it.")
    if output.exists() or output.is_symlink():
        # No word of removing it: it may be the prompts themselves, or a device.
        raise ConfigError(
            f"--output: {output} is there already, and is not written over.",
            "Name another file, or move that one." if output.is_file() else "Name another file.",
        )
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {output.parent}.", "Make it, or name another file.")


def journal_path(output: Path) -> Path:
    """Return the journal of an output file."""
    return output.with_name(f".{output.name}.partial")


def format_record(record: Mapping[str, Any]) -> str:
    """Return a record as JSON on one line, readable where it can be."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # an id with half a character
        return json.dumps(record, allow_nan=False)
    return text


class Journal:
    """The answers that are there, on disk.

    Args:
        output: The file that they are for.
        descriptor: The journal, open and locked.
        header: What the run is known by.
        places: Where in the journal the answer of each line is: first byte and number of bytes.

    Attributes:
        header: The same.
    """

    def __init__(
        self, output: Path, descriptor: int, header: dict[str, Any], places: dict[int, tuple[int, int]]
    ) -> None:
        self._output = output
        self._descriptor = descriptor
        self._places = places
        self.header = header

    @property
    def lines(self) -> set[int]:
        """Lines of the rows whose answers are there."""
        return set(self._places)

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep an answer.

        Raises:
            WriteError: It can't be written.
        """
        data = f"{format_record(record)}\n".encode()
        with held_signals(), _telling(self._output):
            start = os.fstat(self._descriptor).st_size
            _write_all(self._descriptor, data)
            self._places[int(record["line"])] = (start, len(data))

    def finish(self, rows: Iterable[int | Mapping[str, Any]]) -> None:
        """Write the output, whole or not at all, and remove the journal.

        Args:
            rows: In the order of the output, the line of a row whose answer is in the journal, or another's record.

        Raises:
            WriteError: It can't be written; the journal stays.
        """
        lines = (self._read(row) if isinstance(row, int) else f"{format_record(row)}\n".encode() for row in rows)
        output = self._output.absolute()
        mode = os.fstat(self._descriptor).st_mode & 0o777
        with _telling(self._output), written_beside(output, lines, mode=mode) as partial, held_signals():
            move_file_in(partial, output)
            with suppress(OSError):  # all is in the output
                journal_path(output).unlink()

    def close(self) -> None:
        """Let others have it; one without answers is removed."""
        if not self._places:
            with suppress(OSError):
                journal_path(self._output).unlink()
        os.close(self._descriptor)

    def _read(self, line: int) -> bytes:
        start, length = self._places[line]
        return os.pread(self._descriptor, length, start)


@contextmanager
def open_journal(output: Path, header: dict[str, Any], on_notice: Callable[[str], None]) -> Iterator[Journal]:
    """Open the journal of an output file, or begin it.

    Args:
        output: The file of answers; it is not there yet.
        header: What the run is known by: `settings`, a digest of its `rows`; `seed` is what an earlier process chose.
        on_notice: Receives sentences the user should read.

    Raises:
        ConfigError: It can't be written.
        InputError: It belongs to a run with other settings or prompts, or is no journal.
        OutputFolderError: Another process writes it.
    """
    path = journal_path(output)
    with held_signals():
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"--output: {path} can't be written: {error.strerror}.", "Name a file in a folder you can write into."
            ) from error
    try:
        _lock(descriptor, path, output)
        check_output(output)
        journal = _read_or_begin(descriptor, path, output, header, on_notice)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        yield journal
    finally:
        with held_signals():
            journal.close()


def _lock(descriptor: int, path: Path, output: Path) -> None:
    busy = OutputFolderError(
        f"Another dsft command is writing {output} now.", "Wait for it, or name another file with --output."
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:
        return  # some network file systems have no locks
    # Between opening and locking its holder may have finished and removed it.
    try:
        is_there = os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise busy


def _read_or_begin(
    descriptor: int, path: Path, output: Path, header: dict[str, Any], on_notice: Callable[[str], None]
) -> Journal:
    full_header = {"dsft_batch": _VERSION} | header
    with os.fdopen(os.dup(descriptor), "rb") as file:
        first = file.readline()
        if not first.endswith(b"\n"):  # new, or its first process was killed at once
            with _telling(output):
                os.ftruncate(descriptor, 0)
                _write_all(descriptor, f"{format_record(full_header)}\n".encode())
            return Journal(output, descriptor, full_header, {})
        old_header = _parse(first) or {}
        _check_header(old_header, full_header, path)
        places: dict[int, tuple[int, int]] = {}
        position = len(first)
        for data in file:
            record = _parse(data) if data.endswith(b"\n") else None
            if record is None or not isinstance(record.get("line"), int):
                break
            places[record["line"]] = (position, len(data))
            position += len(data)
        num_lost = os.fstat(descriptor).st_size - position
    if num_lost:
        on_notice(f"The last {num_lost} bytes of {path} are no whole answer; what they were for is done again.")
        with _telling(output):
            os.ftruncate(descriptor, position)
    return Journal(output, descriptor, old_header, places)


def _check_header(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    if old.get("dsft_batch") != _VERSION or not isinstance(old.get("settings"), dict):
        raise InputError(f"{path} is no journal that this version of dsft can go on with.", f"Remove it: rm {path}")
    to_do = f"Give what it was begun with to go on, or begin anew: rm {path}"
    settings = {**dict.fromkeys(new["settings"]), **old["settings"]}
    changed = [name for name, value in settings.items() if value != new["settings"].get(name)]
    if changed:
        differences = ", ".join(_describe_change(name, settings[name], new["settings"].get(name)) for name in changed)
        raise InputError(f"{path} holds answers of a run with other settings: {differences}.", to_do)
    if old.get("rows") != new["rows"]:
        raise InputError(f"{path} holds answers to another version of the prompts.", to_do)


def _describe_change(name: str, old: Any, new: Any) -> str:
    if name == "fingerprint":
        return "the model's weights have changed"
    return f"{name} was {json.dumps(old)} and is {json.dumps(new)}"


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def _telling(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"The answers for {output} can't be written: {describe_os_error(error)}.",
            "Make room or check the folder; what was kept so far stays, and the same command goes on.",
        ) from error
