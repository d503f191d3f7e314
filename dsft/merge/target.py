"""Where the merged model goes, and what may be replaced there."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dsft.core.errors import OutputFolderError, WriteError
from dsft.core.locks import held
from dsft.core.models.find_run import MERGE_SUMMARY_FILE, MERGED_FOLDER, RECORD_FILE
from dsft.core.signals import held_signals
from dsft.core.staging import discard, move_in, nearest_folder, put_back, staged
from dsft.core.units import format_gib

SMALL_FILES_BYTES = 64 * 2**20
"""Room for tokenizer, card and what else is small, and for the file system's own."""

_WAYS_ON = "Choose another folder with --output."
_BUSY = "Wait for its end."
_WRITE_FIX = "Put that right and merge again."


def find_target(adapter_dir: Path, output: Path | None, base_folder: Path | None, *, overwrite: bool) -> Path:
    """Return the folder of the merged model, and refuse one that may not be written.

    Args:
        adapter_dir: The adapter's folder.
        output: The folder asked for; None is `merged_model` in the adapter's.
        base_folder: Folder of the base model; None if it is the hub's.
        overwrite: Whether a merged model that is there may be replaced.

    Raises:
        OutputFolderError: The folder holds something, and it is not a merged model that may be replaced; or it can't
            be made; or another command writes there.
    """
    target = (adapter_dir / MERGED_FOLDER) if output is None else output.expanduser()
    _check_place(target)
    resolved = target.resolve()
    for folder, whose in ((adapter_dir, "the adapter"), (base_folder, "the base model")):
        if folder is not None and (resolved == folder.resolve() or resolved in folder.resolve().parents):
            raise OutputFolderError(f"{target} is the folder of {whose}, or around it.", _WAYS_ON)
    with _locked(adapter_dir, target, _staging(target)):
        put_back(target)
        _check_content(target, overwrite=overwrite)
    return target


def check_room(target: Path, num_bytes: int) -> None:
    """Refuse a disk that has too little room; an older model there stays until the new one is complete.

    Raises:
        WriteError: So many bytes do not fit.
    """
    place = target if target.exists() else nearest_folder(target)
    free, needed = shutil.disk_usage(place).free + _leftover_bytes(target), num_bytes + SMALL_FILES_BYTES
    if free < needed:
        raise WriteError(
            f"{place} has {format_gib(free)} free, and the merged model takes {format_gib(needed)}.",
            "Free some, or choose a folder on another disk with --output.",
        )


@contextmanager
def written(
    target: Path, adapter_dir: Path, *, overwrite: bool, on_complete: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Give a folder to write in; it takes the target's place if all goes well, and is removed if not.

    Args:
        target: The folder of the merged model.
        adapter_dir: The adapter's folder.
        overwrite: Whether a merged model that is there may be replaced.
        on_complete: Called once the folder is in its place, before a signal can take effect.

    Raises:
        OutputFolderError: Another command writes into the same place, or trains this adapter, or has written there.
        WriteError: The files can't be written.
    """
    staging = _staging(target)
    with _locked(adapter_dir, target) as locks:

        def take() -> None:
            locks.enter_context(held(staging, _BUSY))
            own = [folder.stat() for folder in (staging, target) if folder.exists()]  # they may be exchanged by then
            locks.callback(_discard_own, staging, own)

        _check_content(target, overwrite=overwrite)
        with staged(staging, target, _WRITE_FIX, take):
            _check_content(target, overwrite=overwrite)  # another merge may have ended until the folder was held
            yield staging
            _check_content(target, overwrite=overwrite)  # writing takes minutes
        _move_in(staging, target, on_complete)


def _check_place(target: Path) -> None:
    if target.name in {"", ".."}:
        raise OutputFolderError(f"--output {target} does not say the folder's own name.", "Say it, e.g. ./merged.")
    if target.is_symlink():
        raise OutputFolderError(f"{target} is a link.", _WAYS_ON)
    if target.exists() and not target.is_dir():
        raise OutputFolderError(f"{target} is not a folder.", _WAYS_ON)
    if target.is_mount():  # no folder can be renamed to its place
        raise OutputFolderError(
            f"{target} is where a file system is mounted.", f"Choose a folder in it: --output {target / MERGED_FOLDER}"
        )
    parent = nearest_folder(target)
    if not parent.is_dir():
        raise OutputFolderError(f"{parent} is not a folder, and {target} belongs there.", _WAYS_ON)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputFolderError(f"{parent} can't be written, and {target} belongs there.", _WAYS_ON)


def _check_content(target: Path, *, overwrite: bool) -> None:
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / MERGE_SUMMARY_FILE).is_file():
        raise OutputFolderError(f"{target} holds files that `dsft merge` did not write.", _WAYS_ON)
    if not overwrite:
        raise OutputFolderError(f"{target} already holds a merged model.", f"Replace it by --overwrite. {_WAYS_ON}")


@contextmanager
def _locked(adapter_dir: Path, *places: Path) -> Iterator[ExitStack]:
    """Hold the adapter against those who write it, and the places that are there against everyone.

    A run that goes on removes its older checkpoints, and it holds the folder around them.
    """
    run_dir = adapter_dir.resolve().parent
    with ExitStack() as locks:
        for folder in (adapter_dir, run_dir) if (run_dir / RECORD_FILE).is_file() else (adapter_dir,):
            locks.enter_context(held(folder, _BUSY, is_shared=True))
        for folder in places:
            with suppress(FileNotFoundError, NotADirectoryError):
                locks.enter_context(held(folder, _BUSY))
        yield locks


def _discard_own(staging: Path, own: list[os.stat_result]) -> None:
    """Remove what is left under the name of the folder to write in; another merge's that came there since stays."""
    with held_signals(), suppress(FileNotFoundError):
        status = staging.stat(follow_symlinks=False)
        if any(os.path.samestat(status, each) for each in own):
            discard(staging)


def _move_in(staging: Path, target: Path, on_complete: Callable[[], None]) -> None:
    try:
        with held_signals():
            move_in(staging, target)
            on_complete()
    except OSError as error:
        put_back(target)
        raise WriteError(f"{target} can't be put in its place: {error}.", _WRITE_FIX) from error


def _leftover_bytes(target: Path) -> int:
    """Return what a merge that was killed left; it is removed before anything is written."""
    staging = _staging(target)
    if staging.is_symlink():
        return 0
    return sum(path.stat().st_blocks * 512 for path in staging.rglob("*") if path.is_file())


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")
