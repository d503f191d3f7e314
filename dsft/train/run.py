"""`dsft train`: fine-tune a model with QLoRA and leave an adapter that says how it was made."""

from dataclasses import dataclass
from pathlib import Path

from dsft.core.config.load import ResolvedConfig
from dsft.core.config.schema import recipe
from dsft.core.data.report import DataReport, SamplePreview
from dsft.core.live_runs import registered
from dsft.train.checkpoint import remove_leftovers
from dsft.train.events import EventSink, Notice, TrainResult
from dsft.train.folders import EVENT_LOG, RunFolders, RunInputs, check_folders, check_same_inputs, locked
from dsft.train.setup import RunSetup, describe_techniques, prepare_setup


@dataclass(frozen=True)
class DryRun:
    """What `dsft train --dry-run` shows.

    Attributes:
        resolved: The configuration with the origin of each value.
        techniques: Technique to one phrase about its use.
        report: What the data holds.
        preview: One sample with its loss mask.
        num_steps: Optimizer steps the run would take.
        num_train_samples: Samples trained on in an epoch.
        num_validation_samples: Samples held out.
    """

    resolved: ResolvedConfig
    techniques: dict[str, str]
    report: DataReport
    preview: SamplePreview
    num_steps: int
    num_train_samples: int
    num_validation_samples: int


def dry_run(resolved: ResolvedConfig, *, sink: EventSink) -> DryRun:
    """Do everything up to loading the model: decide, check, tokenize; write nothing but the token cache."""
    setup = prepare_setup(resolved, sink)
    return DryRun(
        resolved=resolved,
        techniques=describe_techniques(setup),
        report=setup.data.report,
        preview=setup.data.preview,
        num_steps=setup.num_steps,
        num_train_samples=len(setup.data.train),
        num_validation_samples=setup.num_validation_samples,
    )


def run_train(resolved: ResolvedConfig, *, resume: bool, overwrite: bool, sink: EventSink) -> TrainResult:
    """Fine-tune a model.

    Args:
        resolved: The configuration with the origin of each value.
        resume: Go on from the newest valid checkpoint in the output folder, if there is one.
        overwrite: Replace an earlier run in the output and save folders.
        sink: Receives the run's events.

    Returns:
        What was done; also written as training_summary.json beside the adapter.

    Raises:
        DsftError: Wrong input (nothing was written), or a failure while training.
        RunInterrupted: A signal came; a resumable checkpoint was saved.
    """
    config = resolved.config
    folders = RunFolders(Path(config.output_dir), Path(config.save_dir))
    check_folders(folders, resume=resume, overwrite=overwrite, recipe=recipe(config))
    setup = prepare_setup(resolved, sink)
    for remark in setup.data.report.remarks:
        sink(Notice(remark))
    run_name = folders.save_dir.resolve().name
    event_log = folders.output_dir / EVENT_LOG
    with locked(folders), registered(run_name, event_log, folders.output_dir, lambda text: sink(Notice(text))):
        # Another run may have begun there since the first look.
        check_folders(folders, resume=resume, overwrite=overwrite, recipe=recipe(config))
        return _run_locked(setup, folders, resume=resume, sink=sink)


def _run_locked(setup: RunSetup, folders: RunFolders, *, resume: bool, sink: EventSink) -> TrainResult:
    from dsft.train.fit import fit
    from dsft.train.resume import find_checkpoint, find_result

    inputs = RunInputs(setup.data.key, setup.model_fingerprint, setup.optimizer.state)
    remove_leftovers(folders.output_dir)
    checkpoint = None
    if resume:
        check_same_inputs(folders.output_dir, inputs)
        checkpoint = find_checkpoint(folders.output_dir, sink)
        finished = find_result(setup, folders, checkpoint)
        if finished is not None:
            sink(Notice("This run had finished; there was nothing left to do."))
            return finished
    return fit(setup, inputs, folders, checkpoint, resume=resume, sink=sink)
