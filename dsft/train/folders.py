"""The two folders of a run: which run they belong to, and when they may be written."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.core.errors import OutputFolderError
from dsft.train.checkpoint import list_checkpoints, remove_leftovers

RUN_RECORD = "run.json"
EVENT_LOG = "events.jsonl"
_SAVE_FILES = ("adapter_config.json", "config.json")


@dataclass(frozen=True)
class RunFolders:
    """Where a run writes.

    Attributes:
        output_dir: Checkpoints, run record, event log.
        save_dir: The final adapter.
    """

    output_dir: Path
    save_dir: Path


def check_folders(folders: RunFolders, *, resume: bool, overwrite: bool, recipe: dict[str, Any]) -> None:
    """Refuse folders that hold another run; writes nothing.

    Args:
        folders: The run's folders.
        resume: Whether an earlier run there is to be continued.
        overwrite: Whether an earlier run there may be replaced.
        recipe: What the run learns, from `core.config.schema.recipe`.

    Raises:
        OutputFolderError: A folder holds a run (or a file stands in its place), or the run to be resumed was started
            with another recipe.
    """
    for folder in (folders.output_dir, folders.save_dir):
        if folder.exists() and not folder.is_dir():
            raise OutputFolderError(f"{folder} is a file, and a folder is needed there.", "Choose another folder.")
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputFolderError(
                f"{nearest} can't be written, and {folder} belongs there.", "Choose another folder."
            )
    if folders.output_dir.resolve() == folders.save_dir.resolve():
        raise OutputFolderError(
            f"output_dir and save_dir are both {folders.output_dir}.", "Choose two folders: --output-dir, --save-dir."
        )
    if overwrite:
        return
    if resume and _holds_run(folders.output_dir):
        _check_same_recipe(folders.output_dir, recipe)
        return
    if _holds_run(folders.output_dir):
        raise OutputFolderError(
            f"{folders.output_dir} already holds a run.",
            "Go on with it by --resume, replace it by --overwrite, or choose another --output-dir.",
        )
    if any((folders.save_dir / name).exists() for name in _SAVE_FILES):
        raise OutputFolderError(
            f"{folders.save_dir} already holds a trained model.",
            "Go on with its run by --resume, replace it by --overwrite, or choose another --save-dir.",
        )


def check_same_data(output_dir: Path, data_key: str) -> None:
    """Refuse to resume a run on other data: the same step would not see the same samples.

    Raises:
        OutputFolderError: The samples are not those the run was started with.
    """
    path = output_dir / RUN_RECORD
    if path.exists() and json.loads(path.read_text(encoding="utf-8")).get("data_key") != data_key:
        raise OutputFolderError(
            f"The data (or the tokenizer) has changed since the run in {output_dir} was started.",
            "Put the old data back to resume, or start anew with --overwrite or another --output-dir.",
        )


def prepare_folders(folders: RunFolders, *, resume: bool, recipe: dict[str, Any], data_key: str) -> None:
    """Make the folders ready: an overwritten run's own files go, nothing else does; the run record is written."""
    folders.output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folders.output_dir)
    if not resume:
        for checkpoint in list_checkpoints(folders.output_dir):
            shutil.rmtree(checkpoint)
        shutil.rmtree(folders.output_dir / "adapter-best", ignore_errors=True)
        for name in (EVENT_LOG, RUN_RECORD):
            (folders.output_dir / name).unlink(missing_ok=True)
    record = {"recipe": recipe, "data_key": data_key, "save_dir": str(folders.save_dir)}
    staging = folders.output_dir / f".{RUN_RECORD}.writing"
    staging.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    staging.replace(folders.output_dir / RUN_RECORD)


def _holds_run(folder: Path) -> bool:
    return (folder / RUN_RECORD).exists() or bool(list_checkpoints(folder))


def _check_same_recipe(output_dir: Path, recipe: dict[str, Any]) -> None:
    path = output_dir / RUN_RECORD
    if not path.exists():
        raise OutputFolderError(
            f"{output_dir} holds checkpoints but no {RUN_RECORD}, so they are not of a dsft run.",
            "Choose another --output-dir.",
        )
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise OutputFolderError(f"{path} is damaged.", "Start anew with --overwrite.") from None
    now = json.loads(json.dumps(recipe, default=str))
    changes = [
        f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key)
    ]
    if changes:
        raise OutputFolderError(
            f"The run in {output_dir} was started with other settings: {'; '.join(changes)}.",
            "Resume with its settings, or start anew with --overwrite or another --output-dir.",
        )
