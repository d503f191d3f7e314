"""Folders that one process at a time may use."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.core.errors import OutputFolderError


@contextmanager
def held(folder: Path, fix: str) -> Iterator[None]:
    """Keep a folder that is there for this process; the lock ends with the process, however that ends.

    Args:
        folder: The folder.
        fix: What to do if another process holds it.

    Raises:
        OutputFolderError: Another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputFolderError(f"Another dsft command is writing into {folder} now.", fix) from None
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(descriptor)
