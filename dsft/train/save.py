"""The final folder of a run: adapter, tokenizer, summary, plot and model card, written beside and moved in."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.core.errors import CheckpointError
from dsft.core.staging import discard, flush_folder, staged
from dsft.train.checkpoint import WRITE_FIX, find_damage
from dsft.train.events import TrainResult
from dsft.train.folders import ADAPTER_CONFIG, BEST_ADAPTER, MERGED, RunFolders
from dsft.train.restore import ADAPTER_WEIGHTS
from dsft.train.summary import SUMMARY, write_summary
from dsft.train.trainer import QloraTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_final_adapter(
    result: TrainResult, trainer: QloraTrainer, tokenizer: "PreTrainedTokenizerFast", folders: RunFolders
) -> None:
    """Write the save folder.

    training_summary.json is moved in last: a folder that has it is complete. Files of the user's own in that folder
    stay; a merged model of an earlier adapter there is removed, because it is not this adapter's.

    Args:
        result: What the run did.
        trainer: Holds the adapter of the last step.
        tokenizer: The tokenizer the run used.
        folders: The run's folders.

    Raises:
        CheckpointError: The best adapter is to be saved and is damaged or was never written.
        WriteError: The disk is full, or another reason why files can't be written.
    """
    save_dir = folders.save_dir
    staging = save_dir / ".writing"
    with staged(staging, save_dir, WRITE_FIX):
        if result.kept == "best":
            _copy_best(folders.output_dir / BEST_ADAPTER, staging)
        else:
            trainer.save_adapter(staging)
        tokenizer.save_pretrained(str(staging))
        write_summary(result, staging)
    (save_dir / SUMMARY).unlink(missing_ok=True)
    for merged in (MERGED, f".{MERGED}.old", f".{MERGED}.writing"):  # a merge that was killed leaves the others
        discard(save_dir / merged)
    # The first file makes the folder the run's, the last one makes it complete.
    others = sorted({path.name for path in staging.iterdir()} - {ADAPTER_CONFIG, SUMMARY})
    for name in (ADAPTER_CONFIG, *others):
        _replace(staging / name, save_dir / name)
    flush_folder(save_dir)
    _replace(staging / SUMMARY, save_dir / SUMMARY)
    staging.rmdir()
    flush_folder(save_dir)


def _copy_best(best: Path, staging: Path) -> None:
    damage = find_damage(best)
    if damage is not None:
        raise CheckpointError(
            f"The adapter of the lowest validation loss in {best} can't be used: {damage}.",
            "The same command with --resume --keep last saves the adapter of the last step.",
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy2(best / name, staging / name)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
