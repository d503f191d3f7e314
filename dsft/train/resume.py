"""What an earlier process left of a run: where to go on, and what it had not done yet."""

from pathlib import Path
from typing import TYPE_CHECKING

from dsft.core.errors import ModelError
from dsft.train.checkpoint import checkpoint_step, find_newest_valid, set_aside_damaged
from dsft.train.events import EventSink, Notice, TrainResult
from dsft.train.folders import ADAPTER_CONFIG, RunFolders, read_run_id
from dsft.train.restore import ADAPTER_WEIGHTS
from dsft.train.setup import RunSetup
from dsft.train.summary import SUMMARY, read_summary

if TYPE_CHECKING:
    from transformers import TrainerState


def find_checkpoint(output_dir: Path, sink: EventSink) -> Path | None:
    """Return the newest whole checkpoint, or None where there is none; damaged ones are renamed, and both is told."""

    def set_aside(path: Path, damage: str) -> None:
        aside = set_aside_damaged(path)
        sink(Notice(f"Checkpoint {path.name} is left out: {damage}. It is now called {aside.name}.", "warning"))

    checkpoint = find_newest_valid(output_dir, set_aside)
    if checkpoint is not None:
        sink(Notice(f"Going on from {checkpoint}."))
    else:
        sink(Notice(f"There is no checkpoint in {output_dir} to resume from; starting from the beginning.", "warning"))
    return checkpoint


def find_result(setup: RunSetup, folders: RunFolders, checkpoint: Path | None) -> TrainResult | None:
    """Return the result of a run that had finished and whose final folder is whole."""
    needed = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, SUMMARY)
    is_whole = all((folders.save_dir / name).exists() for name in needed)
    if first_step_after(checkpoint) < setup.num_steps or not is_whole:
        return None
    try:
        result = read_summary(folders.save_dir)
    except ModelError:  # of an overwritten run
        return None
    is_this_run = result.run_id == read_run_id(folders.output_dir)
    return result if is_this_run and result.kept == setup.config.keep else None


def first_step_after(checkpoint: Path | None) -> int:
    """Return how many optimizer steps a run has done that goes on from a checkpoint."""
    return checkpoint_step(checkpoint) if checkpoint is not None else 0


def lacks_first_validation(state: "TrainerState | None", save_steps: int) -> bool:
    """Return whether the loss at the step about to begin from is still unmeasured (start, or a pass cut short)."""
    if state is None:
        return True
    return state.global_step % save_steps == 0 and not _is_validated(state)


def lacks_last_validation(setup: RunSetup, state: "TrainerState") -> bool:
    """Return whether the loss at the step a run has come to is still unmeasured."""
    return setup.num_validation_samples > 0 and not _is_validated(state)


def _is_validated(state: "TrainerState") -> bool:
    return any("eval_loss" in log and log["step"] == state.global_step for log in state.log_history)
