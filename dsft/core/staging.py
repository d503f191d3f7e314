"""Folders and files that are complete or not there: written beside their place, brought to disk, and moved in."""

import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from dsft.core.errors import WriteError
from dsft.core.signals import held_signals
from dsft.core.units import format_gib

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staged(staging: Path, target: Path, fix: str, take: Callable[[], None] | None = None) -> Iterator[None]:
    """Make an empty folder to write in, and flush what was written to disk; a failure leaves no folder behind.

    Folders above it that are not there are made, and go again with it.

    Args:
        staging: The folder; what an earlier process left in it is removed.
        target: What it will be, for the message.
        fix: What to do about files that can't be written.
        take: Called when the folder is there and nothing in it is touched yet; where it raises, the folder is another
            process's and stays.

    Raises:
        WriteError: The files can't be written.
    """
    is_taken = False
    new_folders = [folder for folder in staging.absolute().parents if not folder.exists()]
    try:
        with held_signals():
            if staging.is_symlink():
                staging.unlink()
            staging.mkdir(parents=True, exist_ok=True)
            if take is not None:
                take()
            is_taken = True
        _empty(staging)
        yield
        flush_files(staging)
    except BaseException as error:
        with held_signals():  # a second Ctrl-C, from someone in a hurry, would leave half of it
            if is_taken:
                discard(staging)
            with suppress(OSError):  # ends at the first that is not empty
                for folder in new_folders:
                    folder.rmdir()
        if not _is_write_error(error):
            raise
        free = format_gib(shutil.disk_usage(nearest_folder(staging)).free)
        reason = str(error).strip().partition("\n")[0]
        raise WriteError(f"{target} can't be written: {reason} ({free} free there).", fix) from error


def move_in(staging: Path, target: Path) -> None:
    """Put a finished folder in its place; a folder that is there is complete until the new one is.

    The two are exchanged by one system call where the file system can (Linux: renameat2). Elsewhere the old one steps
    aside between two renames, and `put_back` returns it if the process is killed there.
    """
    if not target.exists():
        staging.rename(target)
    elif _exchange(staging, target):
        flush_folder(target.parent)
        discard(staging)
    else:
        aside = _aside(target)
        discard(aside)
        target.rename(aside)
        staging.rename(target)
        flush_folder(target.parent)
        discard(aside)
    flush_folder(target.parent)


@contextmanager
def written_beside(
    target: Path, chunks: Iterable[bytes], *, mode: int | None = None, keeps_all: bool = False
) -> Iterator[Path]:
    """Write a file beside the place that it is for and bring it to disk; it goes again if nothing moves it there.

    Its name is new and can't be known before, so that nothing which is there is written into.

    Args:
        target: The place, in a folder that is there.
        chunks: The content.
        mode: Permissions; None is those of the file in that place, or without one those of any new file.
        keeps_all: Whether owner, group and extended attributes of the file in that place are kept too.

    Raises:
        OSError: It can't be written, or not be given what it has to keep.
    """
    partial: Path | None = None
    try:
        with held_signals():
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".dsft-", suffix=".part")
            partial = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(chunks)
            file.flush()
            if keeps_all:
                _copy_attributes(target, descriptor)
                os.fchown(descriptor, target.stat().st_uid, target.stat().st_gid)
            # Last, as a new owner takes set-id bits away.
            os.fchmod(descriptor, _file_mode(target) if mode is None else mode)
            os.fsync(descriptor)
        yield partial
    finally:
        if partial is not None:
            with held_signals(), suppress(OSError):
                partial.unlink(missing_ok=True)


def move_file_in(partial: Path, target: Path) -> None:
    """Put a file from `written_beside` in its place, where another may be.

    Raises:
        OSError: It can't be moved. What fails after that is no failure: the file is in its place.
    """
    partial.replace(target)
    with suppress(OSError):  # a folder that may be written into but not read can't be opened
        flush_folder(target.parent)


def put_back(target: Path) -> None:
    """Undo or finish what a process left that was killed in `move_in`."""
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        discard(aside)
    else:
        aside.rename(target)


def discard(folder: Path) -> None:
    """Remove a folder if it is there, what makes it loadable first: a kill in between leaves nothing that loads.

    Of a link only the link goes.
    """
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    _make_unloadable(folder)
    shutil.rmtree(folder, ignore_errors=True)


def flush_files(folder: Path) -> None:
    """Bring the files of a folder to disk, readable to whom new files of this user are."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.chmod(_new_file_mode())  # safetensors gives its files to their owner alone
        flush_file(path)
    flush_folder(folder)


def flush_file(path: Path) -> None:
    """Bring what was written to a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Bring what was renamed in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest_folder(path: Path) -> Path:
    """Return the nearest folder above a path that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _empty(folder: Path) -> None:
    """Remove what is in a folder and keep the folder itself, and with it its lock."""
    _make_unloadable(folder)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _make_unloadable(folder: Path) -> None:
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name != "config.json"):
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _is_write_error(error: BaseException) -> bool:
    # torch's writer has no class of its own.
    is_of_torch = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_co" in str(error))
    return isinstance(error, OSError | SafetensorError) or is_of_torch


def _copy_attributes(path: Path, descriptor: int) -> None:
    """Copy extended attributes, access lists among them, as far as the file system and our rights go."""
    with suppress(OSError):
        for name in os.listxattr(path):
            with suppress(OSError):
                os.setxattr(descriptor, name, os.getxattr(path, name))


def _file_mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return _new_file_mode()


def _new_file_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
