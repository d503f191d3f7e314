"""Folders that one process at a time may write into, or several may read."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.core.errors import OutputFolderError


@contextmanager
def held(folder: Path, fix: str, *, is_shared: bool = False) -> Iterator[None]:
    """Keep a folder that is there for this process; the lock ends with the process, however that ends.

    Args:
        folder: The folder.
        fix: What to do if another process holds it.
        is_shared: Whether it is only read, and others may read it too.

    Raises:
        OutputFolderError: Another process holds it, or has just put another folder in its place.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        use = _lock(descriptor, folder, is_shared=is_shared)
        if use is not None:
            raise OutputFolderError(f"Another dsft command is {use} {folder} now.", fix)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, *, is_shared: bool) -> str | None:
    """Lock an open folder, or return what another process does with it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return "writing into" if is_shared or not _may_read(descriptor) else "reading"
    except OSError:
        return None  # some network file systems have no locks
    # Between opening and locking its holder may have renamed or removed it.
    return None if _is_at(descriptor, folder) else "writing into"


def _may_read(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
