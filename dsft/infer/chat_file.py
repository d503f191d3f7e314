"""Conversations in a JSONL file of training data: a row added or written anew, the file whole at every moment."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dsft.core.errors import InputError, WriteError, describe_os_error
from dsft.core.signals import held_signals
from dsft.core.staging import move_file_in, written_beside

Row = Sequence[Mapping[str, str]]
"""The messages of a conversation."""


def put_row(path: Path, row: Row, earlier: Row | None) -> bool:
    """Write a row into a file that `dsft train --dataset` reads.

    Args:
        path: The file; made where it is not there.
        row: What to write.
        earlier: What was written for the same conversation before; where the file still has it, `row` takes its place.

    Returns:
        Whether that was so.

    Raises:
        InputError: The file is of another kind, or holds something other than conversations.
        WriteError: The file can't be read or written; it is as it was.
    """
    if path.suffix.lower() != ".jsonl":
        raise InputError(
            f"{path.name} does not end in .jsonl, so `dsft train --dataset` would not know what it is.",
            f"Take a name such as {path.stem or 'chats'}.jsonl.",
        )
    target = path.resolve()  # a link stays one
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"{path} is there and no file.", "Take another name.")
        with _locked(target) as descriptor:
            lines = _read_lines(descriptor)
            _check_kind(lines, path)
            line = _to_line(row)
            has_replaced = earlier is not None and _to_line(earlier) in lines
            if earlier is not None and has_replaced:
                lines[lines.index(_to_line(earlier))] = line
            else:
                lines.append(line)
            with written_beside(target, (line + b"\n" for line in lines)) as partial:
                move_file_in(partial, target)
    except OSError as error:
        raise WriteError(
            f"{path} can't be written: {describe_os_error(error)}.", "Check folder, permissions and free space."
        ) from error
    return has_replaced


def _to_line(row: Row) -> bytes:
    return json.dumps({"messages": row}, ensure_ascii=False).encode()


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open a file that no other chat writes meanwhile; it is made where it is not there, and goes if it stays empty."""
    while True:
        descriptor, is_new = _open(path)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):  # who held it has put another file in its place
                continue
            try:
                yield descriptor
            finally:
                with held_signals(), suppress(OSError):
                    if is_new and _is_at(descriptor, path):
                        path.unlink()
            return
        finally:
            os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """Open a file to read; return it, and whether it was made for that."""
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    with suppress(FileExistsError):
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_lines(descriptor: int) -> list[bytes]:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        content = file.read()
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _check_kind(lines: Sequence[bytes], path: Path) -> None:
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    try:
        row = json.loads(first)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise InputError(
            f"{path} is there, and its first row is no conversation (an object with messages).", "Take another file."
        )
