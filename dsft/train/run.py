"""`dsft train`: fine-tune a model with QLoRA and leave an adapter that says how it was made."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.config.load import ResolvedConfig
from dsft.core.config.schema import recipe
from dsft.core.data.prepare import SamplePreview
from dsft.core.data.report import DataReport
from dsft.core.errors import OutputFolderError, RunInterrupted
from dsft.core.gpu import open_gpu_memory
from dsft.core.models.load import LoraSettings, attach_lora, enable_checkpointing, load_quantized
from dsft.train.arguments import make_arguments
from dsft.train.checkpoint import checkpoint_step, find_newest_valid, list_checkpoints
from dsft.train.events import EventSink, Notice, Phase, RunStarted, TrainResult
from dsft.train.folders import EVENT_LOG, RunFolders, check_folders, check_same_data, prepare_folders
from dsft.train.interrupt import InterruptGuard
from dsft.train.recorder import RunRecorder
from dsft.train.reports import TrainerHooks
from dsft.train.restore import load_adapter_weights, read_trainer_state
from dsft.train.result import build_result
from dsft.train.save import save_final_adapter
from dsft.train.setup import RunSetup, describe_techniques, prepare_setup
from dsft.train.trainer import ExecutionPlan, QloraTrainer

if TYPE_CHECKING:
    from transformers import TrainerState


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
    if resume:
        check_same_data(folders.output_dir, setup.data.key)
    checkpoint = _find_checkpoint(folders.output_dir, sink) if resume else None

    model = _load_model(setup, sink)
    # Not before the model is there: an earlier run that is overwritten goes only now.
    prepare_folders(folders, resume=resume, recipe=recipe(config), data_key=setup.data.key)
    gpu_memory = open_gpu_memory(setup.device.uuid) if setup.device.uuid is not None else None
    recorder = RunRecorder(sink, folders.output_dir / EVENT_LOG, setup.num_steps, gpu_memory)
    started_s = time.perf_counter()
    try:
        trainer = _train(setup, model, checkpoint, recorder)
        recorder.tell(Phase("save the adapter"))
        duration_s = time.perf_counter() - started_s
        result = build_result(setup, trainer, recorder, first_step=_first_step(checkpoint), duration_s=duration_s)
        save_final_adapter(result, trainer, setup.tokenizer.tokenizer, folders)
        return result
    finally:
        recorder.close()


def _find_checkpoint(output_dir: Path, sink: EventSink) -> Path | None:
    def tell_damage(path: Path, damage: str) -> None:
        sink(Notice(f"Checkpoint {path.name} is left out: {damage}.", "warning"))

    checkpoint = find_newest_valid(output_dir, tell_damage)
    if checkpoint is not None:
        sink(Notice(f"Going on from {checkpoint}."))
        return checkpoint
    if list_checkpoints(output_dir):
        raise OutputFolderError(
            f"No checkpoint in {output_dir} is whole, so there is nothing to resume from.",
            "Start anew with --overwrite.",
        )
    sink(Notice(f"There is no checkpoint in {output_dir} to resume from; starting from the beginning.", "warning"))
    return None


def _load_model(setup: RunSetup, sink: EventSink) -> Any:
    config = setup.config
    sink(Phase("load and quantize the model"))
    model = load_quantized(setup.source, setup.device, setup.precision, setup.attention)
    lora = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.seed)
    peft_model = attach_lora(model, lora)
    if config.gradient_checkpointing:
        enable_checkpointing(peft_model)
    return peft_model


def _train(setup: RunSetup, model: Any, checkpoint: Path | None, recorder: RunRecorder) -> QloraTrainer:
    config = setup.config
    first_step = _first_step(checkpoint)
    resumed_state = read_trainer_state(checkpoint) if checkpoint is not None else None
    with InterruptGuard() as guard:
        trainer = QloraTrainer(
            model,
            make_arguments(
                config,
                device=setup.device,
                precision=setup.precision,
                optimizer=setup.optimizer,
                num_steps=setup.num_steps,
                has_validation=setup.num_validation_samples > 0,
                validate_first=_lacks_validation(resumed_state, config.save_steps),
            ),
            sequences=setup.sequences,
            validation=setup.data.validation,
            effective_batch_size=config.effective_batch_size,
            plan=ExecutionPlan(
                micro_batch_size=config.per_device_train_batch_size,
                validation_tokens=_validation_tokens(setup),
            ),
            num_checkpoints_kept=config.save_total_limit,
            num_workers=config.dataloader_num_workers,
            guard=guard,
            hooks=TrainerHooks(recorder.on_step, recorder.on_validation, recorder.on_checkpoint, recorder.on_interrupt),
        )
        recorder.tell(_started(setup, model, first_step))
        _reset_peaks()
        if checkpoint is not None and resumed_state is not None and first_step >= setup.num_steps:
            # The run had finished: only its final files are written again.
            load_adapter_weights(model, checkpoint)
            trainer.state = resumed_state
            return trainer
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    state = trainer.state
    if guard.signal_name is not None and state.global_step < setup.num_steps:
        saved = Path(config.output_dir) / f"checkpoint-{state.global_step}"
        raise RunInterrupted(guard.signal_name, str(saved), state.global_step)
    return trainer


def _first_step(checkpoint: Path | None) -> int:
    return checkpoint_step(checkpoint) if checkpoint is not None else 0


def _lacks_validation(state: "TrainerState | None", save_steps: int) -> bool:
    """Return whether the loss at the step about to begin from is still unmeasured (start, or a pass cut short)."""
    if state is None:
        return True
    is_due = state.global_step % save_steps == 0
    return is_due and not any("eval_loss" in log and log["step"] == state.global_step for log in state.log_history)


def _validation_tokens(setup: RunSetup) -> int:
    """Return how many tokens a validation pass may have: no more than training, which also keeps activations, holds."""
    config, lengths = setup.config, setup.data.train.lengths
    if config.packing:
        return config.per_device_train_batch_size * config.max_length
    return max(int(lengths.max()), config.per_device_train_batch_size * round(float(lengths.mean())))


def _reset_peaks() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _started(setup: RunSetup, model: Any, first_step: int) -> RunStarted:
    config = setup.config
    num_trainable, num_parameters = model.get_nb_trainable_parameters()
    return RunStarted(
        run_name=Path(config.save_dir).name,
        model_name=config.model_name,
        device=setup.device.name,
        precision=setup.precision,
        attention=setup.attention.description,
        optimizer=setup.optimizer.description,
        num_steps=setup.num_steps,
        first_step=first_step,
        num_epochs=setup.num_epochs,
        effective_batch_size=config.effective_batch_size,
        micro_batch_size=config.per_device_train_batch_size,
        num_train_samples=len(setup.data.train),
        num_validation_samples=setup.num_validation_samples,
        num_trainable_parameters=num_trainable,
        num_parameters=num_parameters,
    )
