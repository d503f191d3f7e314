"""Checkpoints as folders that are either complete or not there; knows nothing of models or optimizers.

A checkpoint is written in a folder beside its place, every file is flushed to disk and listed with its SHA-256 in
manifest.json, and the folder is then renamed. A kill at any moment leaves the older checkpoint as the newest valid
one; a file that changed or vanished later is found before anything is read from it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from dsft.core.staging import move_in, staged

WRITE_FIX = "Put that right, then go on with --resume (and without --overwrite)."
"""What to do about a checkpoint or final folder that can't be written."""

MANIFEST = "manifest.json"
_FINISHED = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\.(checkpoint-\d+|adapter-\w+)\.(writing|old)")


def write_checkpoint(folder: Path, step: int, write_files: Callable[[Path], None]) -> Path:
    """Write a checkpoint so that it appears complete or not at all.

    Args:
        folder: The run's output folder.
        step: Optimizer steps done.
        write_files: Writes the content into the folder it is given.

    Returns:
        `folder/checkpoint-<step>`.
    """
    return replace_folder(folder / f"checkpoint-{step}", write_files)


def replace_folder(target: Path, write_files: Callable[[Path], None]) -> Path:
    """Write a folder with a manifest beside its place and rename it there, replacing an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.writing"
    with staged(staging, target, WRITE_FIX):
        write_files(staging)
        _write_manifest(staging)
    move_in(staging, target)
    return target


def set_aside_damaged(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it counts no more; what is in it is left to look at."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a run, newest (highest step) first; their content is not checked."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _FINISHED.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step a checkpoint's name carries."""
    match = _FINISHED.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step>")
    return int(match.group(1))


def find_damage(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest.

    Returns:
        One phrase about the first file that is missing or changed; None if all is well.
    """
    try:
        files: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, OSError):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} has changed since it was written"
    return None


def find_newest_valid(folder: Path, on_damage: Callable[[Path, str], None]) -> Path | None:
    """Return the newest checkpoint that is whole, telling of each newer one that is not."""
    for checkpoint in list_checkpoints(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        on_damage(checkpoint, damage)
    return None


def remove_old_checkpoints(folder: Path, num_kept: int) -> None:
    """Remove all but the newest `num_kept` checkpoints, oldest first."""
    for checkpoint in reversed(list_checkpoints(folder)[num_kept:]):
        shutil.rmtree(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written; put a folder back that was killed between its two renames."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        target = folder / match.group(1)
        if match.group(2) == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {"files": {str(path.relative_to(folder)): _sha256(path) for path in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
