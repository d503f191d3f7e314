"""The final folder of a run: adapter, tokenizer, summary, plot and model card, written beside and moved in."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.train.events import TrainResult
from dsft.train.folders import RunFolders
from dsft.train.restore import ADAPTER_WEIGHTS
from dsft.train.summary import write_summary
from dsft.train.trainer import BEST_ADAPTER, QloraTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SUMMARY = "training_summary.json"
MERGED = "merged_model"


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
    """
    save_dir = folders.save_dir
    staging = save_dir / ".writing"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    if result.kept == "best":
        best = folders.output_dir / BEST_ADAPTER
        for name in ("adapter_config.json", ADAPTER_WEIGHTS):
            shutil.copy2(best / name, staging / name)
    else:
        trainer.save_adapter(staging)
    tokenizer.save_pretrained(str(staging))
    write_summary(result, staging)
    (save_dir / SUMMARY).unlink(missing_ok=True)
    shutil.rmtree(save_dir / MERGED, ignore_errors=True)
    names = sorted(path.name for path in staging.iterdir())
    for name in sorted(names, key=lambda name: name == SUMMARY):
        _replace(staging / name, save_dir / name)
    staging.rmdir()


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
