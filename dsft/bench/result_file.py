"""The file that `--output` keeps a result in: tried before anything is measured, and never half-written."""

import os
from contextlib import suppress
from pathlib import Path

from dsft.core.errors import ConfigError


def check_output(path: Path) -> None:
    """Refuse a file that a result can't be written into, by writing beside it what is removed again.

    Raises:
        ConfigError: There is no such folder, it can't be written into, or the name is taken by something that is no
            file.
    """
    try:
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--output: there is no folder {path.parent}.", "Make it, or name another file.")
        if path.is_dir():
            raise ConfigError(f"--output: {path} is a folder.", "Name a file in it.")
        if path.exists() and not path.is_file():
            raise ConfigError(f"--output: {path} is no regular file.", "Name another file.")
        partial = _partial(path)
        partial.write_text("", encoding="utf-8")
        partial.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output: {path} can't be written: {error.strerror}.", "Name a file in a folder you can write into."
        ) from error


def write_record(text: str, path: Path) -> None:
    """Write a record's JSON; the file appears whole or not at all.

    Raises:
        OSError: It can't be written; an earlier one is as it was.
    """
    partial = _partial(path)
    try:
        partial.write_text(f"{text}\n", encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
