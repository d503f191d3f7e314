"""The two folders of a run: which run they belong to, and when they may be written."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsft.core.errors import OutputFolderError
from dsft.core.locks import held
from dsft.train.checkpoint import list_checkpoints

RUN_RECORD = "run.json"
EVENT_LOG = "events.jsonl"
BEST_ADAPTER = "adapter-best"
"""Folder in the output folder that holds the adapter of the lowest validation loss."""

ADAPTER_CONFIG = "adapter_config.json"
"""In a save folder it says that the folder is a run's."""

MERGED = "merged_model"

_FOREIGN = (
    "config.json",
    "README.md",
    "loss.png",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_summary.json",
    MERGED,
)
"""What a save folder that is no run's may hold, and a run would replace or (a whole model) spoil."""


@dataclass(frozen=True)
class RunFolders:
    """Where a run writes.

    Attributes:
        output_dir: Checkpoints, run record, event log.
        save_dir: The final adapter.
    """

    output_dir: Path
    save_dir: Path


@dataclass(frozen=True)
class RunInputs:
    """What a run computes with; a resumed run must have the same, or it would be another run.

    Attributes:
        data: Key of the samples and their division.
        model: Fingerprint of the base model's weights.
        optimizer: Whose optimizer state the checkpoints hold: bitsandbytes or torch.
    """

    data: str
    model: str
    optimizer: str


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
        if folder.is_symlink() and not folder.exists():
            raise OutputFolderError(f"{folder} is a link to a place that is not there.", "Choose another folder.")
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputFolderError(
                f"{nearest} can't be written, and {folder} belongs there.", "Choose another folder."
            )
    if folders.output_dir.resolve() == folders.save_dir.resolve():
        raise OutputFolderError(
            f"output_dir and save_dir are both {folders.output_dir}.", "Choose two folders: --output-dir, --save-dir."
        )
    _check_foreign_files(folders.save_dir)
    if list_checkpoints(folders.output_dir) and not (folders.output_dir / RUN_RECORD).exists():
        raise OutputFolderError(
            f"{folders.output_dir} holds checkpoints but no {RUN_RECORD}, so they are not of a dsft run.",
            "Choose another --output-dir.",
        )
    if overwrite:
        return
    if resume and _holds_run(folders.output_dir):
        record = _read_record(folders.output_dir)
        _check_same_recipe(folders.output_dir, record, recipe)
        if Path(record["save_dir"]).resolve() != folders.save_dir.resolve():
            _check_save_folder(folders.save_dir)
        return
    if _holds_run(folders.output_dir):
        raise OutputFolderError(
            f"{folders.output_dir} already holds a run.",
            "Go on with it by --resume, replace it by --overwrite, or choose another --output-dir.",
        )
    _check_save_folder(folders.save_dir)


def check_same_inputs(output_dir: Path, inputs: RunInputs) -> None:
    """Refuse to resume a run on other data, other base weights or with an optimizer that can't read its state.

    Raises:
        OutputFolderError: The run was started with something else.
    """
    if not _holds_run(output_dir):
        return
    earlier = _read_record(output_dir).get("inputs", {})
    changes = [name for name, value in asdict(inputs).items() if earlier.get(name) != value]
    if not changes:
        return
    found, fix = {
        "data": ("The data (or the tokenizer) has changed", "Put the old data back"),
        "model": ("The weights of the base model have changed", "Put the old model back"),
        "optimizer": (
            f"The optimizer is now {inputs.optimizer}'s, which can't read the state that was saved of "
            f"{earlier.get('optimizer')}'s; that has changed",
            "Take the kind of device it ran on",
        ),
    }[changes[0]]
    raise OutputFolderError(
        f"{found} since the run in {output_dir} was started.",
        f"{fix} to resume, or start anew with --overwrite or another --output-dir.",
    )


@contextmanager
def locked(folders: RunFolders) -> Iterator[None]:
    """Make a run's folders and keep them for this process: two runs never write into the same one.

    Folders made here are removed again if nothing was written into them.

    Raises:
        OutputFolderError: Another process holds a folder, or it can't be made.
    """
    with _held(folders.output_dir, "--output-dir"), _held(folders.save_dir, "--save-dir"):
        yield


@contextmanager
def _held(folder: Path, flag: str) -> Iterator[None]:
    with _made(folder), held(folder, f"Wait for its end, or choose another {flag}."):
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFolderError(f"{folder} can't be made: {error.strerror}.", "Choose another folder.") from error
    try:
        yield
    finally:
        with suppress(OSError):  # ends at the first that is not empty
            for path in new_folders:
                path.rmdir()


def prepare_folders(
    folders: RunFolders, *, resume: bool, recipe: dict[str, Any], inputs: RunInputs, facts: dict[str, Any]
) -> str:
    """Make the folders ready: an overwritten run's own files go, nothing else does; the run record is written.

    Args:
        folders: The run's folders, locked.
        resume: Whether an earlier run there is continued.
        recipe: What the run learns.
        inputs: What it computes with.
        facts: What else the record says: template and model, as `infer` needs them for a checkpoint.

    Returns:
        The run's id; a resumed run keeps its own.
    """
    if not resume:
        for checkpoint in [*list_checkpoints(folders.output_dir), *folders.output_dir.glob("checkpoint-*.damaged")]:
            shutil.rmtree(checkpoint)
        shutil.rmtree(folders.output_dir / BEST_ADAPTER, ignore_errors=True)
        for name in (EVENT_LOG, RUN_RECORD):
            (folders.output_dir / name).unlink(missing_ok=True)
    run_id = read_run_id(folders.output_dir) or uuid.uuid4().hex
    record = {
        "run_id": run_id,
        "recipe": recipe,
        "inputs": asdict(inputs),
        "save_dir": str(folders.save_dir.resolve()),
        **facts,
    }
    staging = folders.output_dir / f".{RUN_RECORD}.writing"
    staging.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    staging.replace(folders.output_dir / RUN_RECORD)
    return run_id


def read_run_id(output_dir: Path) -> str | None:
    """Return the id of the run in an output folder, or None where there is none."""
    return str(_read_record(output_dir)["run_id"]) if (output_dir / RUN_RECORD).exists() else None


def _holds_run(folder: Path) -> bool:
    return (folder / RUN_RECORD).exists() or bool(list_checkpoints(folder))


def _check_foreign_files(save_dir: Path) -> None:
    if (save_dir / ADAPTER_CONFIG).exists():
        return
    for name in _FOREIGN:
        if (save_dir / name).exists():
            raise OutputFolderError(
                f"{save_dir} holds {name} and is no folder of a run, which would replace it.",
                "Choose another --save-dir.",
            )


def _check_save_folder(save_dir: Path) -> None:
    if (save_dir / ADAPTER_CONFIG).exists():
        raise OutputFolderError(
            f"{save_dir} already holds a trained model.",
            "Go on with its run by --resume, replace it by --overwrite, or choose another --save-dir.",
        )


def _read_record(output_dir: Path) -> dict[str, Any]:
    path = output_dir / RUN_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        record = None
    kinds = {"run_id": str, "recipe": dict, "inputs": dict, "save_dir": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise OutputFolderError(f"{path} is damaged.", "Start anew with --overwrite.")
    return record


def _check_same_recipe(output_dir: Path, record: dict[str, Any], recipe: dict[str, Any]) -> None:
    earlier = record["recipe"]
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
