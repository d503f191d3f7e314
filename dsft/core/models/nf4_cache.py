"""The folder of quantized copies: one file each, complete or not there; trouble with it is told and stops nothing."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.errors import describe_os_error
from dsft.core.models.nf4_file import CopyFile, DamagedCopyError, count_copy_bytes, write_copy
from dsft.core.models.nf4_key import CopyKey
from dsft.core.notices import Notify
from dsft.core.paths import nf4_cache_dir
from dsft.core.private_folder import check_own_file, check_private_folder, make_private_folder
from dsft.core.staging import nearest_folder
from dsft.core.units import format_gib

if TYPE_CHECKING:
    import torch

LEAST_COPY_BYTES = 64 * 2**20
"""A smaller model is quantized in no time."""

SPARE_BYTES = 2**30
"""What a copy must leave free on its disk."""

_PARTIAL = ".partial"


@contextmanager
def opened_copy(key: CopyKey, on_notice: Notify) -> Iterator[CopyFile | None]:
    """Open the copy of a key, or give None where there is none that can be read.

    It stays whole for this process even where another one removes or replaces it. A DamagedCopyError inside removes it.

    Raises:
        DamagedCopyError: As raised inside.
    """
    path = nf4_cache_dir() / key.file_name
    try:
        descriptor = _open(path)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        on_notice(f"The quantized copy {path} can't be read: {describe_os_error(error)}.")
        yield None
        return
    try:
        yield CopyFile(descriptor)
    except DamagedCopyError:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def keep_copy(key: CopyKey, tensors: "Mapping[str, torch.Tensor]", notes: Mapping[str, Any], on_notice: Notify) -> None:
    """Write a copy beside its place and move it in, and remove earlier ones of its series.

    It is not flushed to the disk: its checksums tell a file that a crash has cut short, and the run needn't wait.

    Args:
        key: Its name.
        tensors: What it holds.
        notes: What it says besides.
        on_notice: Receives what came of it.
    """
    folder = nf4_cache_dir()
    num_bytes = count_copy_bytes(tensors)
    if num_bytes < LEAST_COPY_BYTES:
        return
    try:
        make_private_folder(folder)
        _remove_abandoned(folder)
        needed_bytes = num_bytes + SPARE_BYTES
        free_bytes = shutil.disk_usage(nearest_folder(folder / key.file_name)).free
        if free_bytes < needed_bytes:
            on_notice(
                f"No quantized copy was kept in {folder}: {format_gib(free_bytes)} are free there, and it needs "
                f"{format_gib(needed_bytes)}."
            )
            return
        with _own_partial(folder / f".{key.file_name}{_PARTIAL}") as descriptor:
            if descriptor is None:
                return  # another process is writing the same
            write_copy(descriptor, tensors, notes)
            (folder / f".{key.file_name}{_PARTIAL}").rename(folder / key.file_name)
        _remove_earlier(folder, key)
    except OSError as error:
        on_notice(f"No quantized copy was kept in {folder}: {describe_os_error(error)}.")
        return
    on_notice(f"Kept a quantized copy ({format_gib(num_bytes)}) in {folder}; it is safe to delete.")


def _open(path: Path) -> int:
    check_private_folder(path.parent)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        check_own_file(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _own_partial(path: Path) -> Iterator[int | None]:
    """Open an empty file that no other process writes; None where one does. It goes unless it is renamed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        if not _lock(descriptor, path):
            yield None
            return
        try:
            os.ftruncate(descriptor, 0)
            yield descriptor
        finally:
            if _is_at(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    for path in folder.glob(f".*{_PARTIAL}"):
        with suppress(OSError), _own_partial(path):
            pass


def _remove_earlier(folder: Path, key: CopyKey) -> None:
    for path in folder.glob(f"{key.series}-*.safetensors"):
        if path.name != key.file_name:
            with suppress(OSError):
                path.unlink()


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Between opening and locking its writer may have renamed or removed it.
    return _is_at(descriptor, path)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
