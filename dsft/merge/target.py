"""Where the merged model goes, and what may be replaced there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.core.errors import OutputFolderError, WriteError
from dsft.core.locks import held
from dsft.core.models.find_run import MERGE_SUMMARY_FILE, MERGED_FOLDER
from dsft.core.staging import move_in, nearest_folder, put_back, staged
from dsft.core.units import format_gib

SMALL_FILES_BYTES = 64 * 2**20
"""Room for tokenizer, card and what else is small, and for the file system's own."""

_WAYS_ON = "Choose another folder with --output."
_BUSY = "Wait for its end."


def find_target(adapter_dir: Path, output: Path | None, base_folder: Path | None, *, overwrite: bool) -> Path:
    """Return the folder of the merged model, and refuse one that may not be written.

    Args:
        adapter_dir: The adapter's folder.
        output: The folder asked for; None is `merged_model` in the adapter's.
        base_folder: Folder of the base model; None if it is the hub's.
        overwrite: Whether a merged model that is there may be replaced.

    Raises:
        OutputFolderError: The folder holds something, and it is not a merged model that may be replaced.
    """
    target = (adapter_dir / MERGED_FOLDER) if output is None else output.expanduser()
    put_back(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputFolderError(f"{target} is not a folder.", _WAYS_ON)
    resolved = target.resolve()
    for folder, whose in ((adapter_dir, "the adapter"), (base_folder, "the base model")):
        if folder is not None and (resolved == folder.resolve() or resolved in folder.resolve().parents):
            raise OutputFolderError(f"{target} is the folder of {whose}, or around it.", _WAYS_ON)
    if not target.exists() or not any(target.iterdir()):
        return target
    if not (target / MERGE_SUMMARY_FILE).is_file():
        raise OutputFolderError(f"{target} holds files that `dsft merge` did not write.", _WAYS_ON)
    if not overwrite:
        raise OutputFolderError(f"{target} already holds a merged model.", f"Replace it by --overwrite. {_WAYS_ON}")
    return target


def check_room(target: Path, num_bytes: int) -> None:
    """Refuse a disk that has too little room; an older model there stays until the new one is complete.

    Raises:
        WriteError: So many bytes do not fit.
    """
    place = target if target.exists() else nearest_folder(target)
    free, needed = shutil.disk_usage(place).free, num_bytes + SMALL_FILES_BYTES
    if free < needed:
        raise WriteError(
            f"{place} has {format_gib(free)} free, and the merged model takes {format_gib(needed)}.",
            "Free some, or choose a folder on another disk with --output.",
        )


@contextmanager
def written(target: Path, adapter_dir: Path) -> Iterator[Path]:
    """Give a folder to write in; it takes the target's place if all goes well, and is removed if not.

    Raises:
        OutputFolderError: Another command writes into the same place, or trains this adapter.
        WriteError: The files can't be written.
    """
    staging = target.with_name(f".{target.name}.writing")
    with held(adapter_dir, _BUSY):
        if staging.is_dir():
            with held(staging, _BUSY):
                pass  # what it holds is of a process that was killed
        with staged(staging, target, "Put that right and merge again."), held(staging, _BUSY):
            yield staging
        move_in(staging, target)
