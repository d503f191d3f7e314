"""Conversations in a JSONL file of training data: a row added or written anew, the file whole at every moment."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsft.core.errors import InputError, WriteError
from dsft.core.signals import held_signals
from dsft.core.staging import flush_folder

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
        lines = _read_lines(target)
        _check_kind(lines, path)
        line = _to_line(row)
        has_replaced = earlier is not None and _to_line(earlier) in lines
        if earlier is not None and has_replaced:
            lines[lines.index(_to_line(earlier))] = line
        else:
            lines.append(line)
        _replace(target, b"".join(line + b"\n" for line in lines))
    except OSError as error:
        raise WriteError(
            f"{path} can't be written: {error.strerror or error}.", "Check folder, permissions and free space."
        ) from error
    return has_replaced


def _to_line(row: Row) -> bytes:
    return json.dumps({"messages": row}, ensure_ascii=False).encode()


def _read_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    if not path.is_file():
        raise InputError(f"{path} is there and no file.", "Take another name.")
    content = path.read_bytes()
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


def _replace(path: Path, content: bytes) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    with held_signals():
        try:
            with staging.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, staging)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        flush_folder(path.parent)
