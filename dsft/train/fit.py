"""Load the model, train it and save the adapter, all decisions taken; imports PyTorch."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsft.core.config.schema import recipe
from dsft.core.errors import DoesNotFitError, RunInterrupted
from dsft.core.memory.plan import ExecutionPlan
from dsft.core.models.device import limit_allocator
from dsft.core.models.load import LoraSettings, attach_lora, load_quantized
from dsft.train.arguments import count_warmup_steps, make_arguments
from dsft.train.blocks import take_blocks
from dsft.train.checkpoint import list_checkpoints
from dsft.train.events import EventSink, Notice, Phase, RunStarted, TrainResult
from dsft.train.folders import EVENT_LOG, RunFolders, RunInputs, prepare_folders
from dsft.train.interrupt import InterruptGuard
from dsft.train.planning import keep_checkpoint_plan
from dsft.train.recorder import RunRecorder
from dsft.train.recovery import PlanChange
from dsft.train.reports import StepReport, TrainerHooks
from dsft.train.restore import load_adapter_weights, read_trainer_state
from dsft.train.result import build_result
from dsft.train.resume import first_step_after, lacks_first_validation, lacks_last_validation
from dsft.train.save import save_final_adapter
from dsft.train.schedule import learning_rate_factor
from dsft.train.setup import RunSetup
from dsft.train.trainer import QloraTrainer


def fit(
    setup: RunSetup, inputs: RunInputs, folders: RunFolders, checkpoint: Path | None, *, resume: bool, sink: EventSink
) -> TrainResult:
    """Train and save.

    Args:
        setup: What the run uses.
        inputs: What it computes with, for the record.
        folders: Its folders, locked.
        checkpoint: Where to go on; None for the beginning.
        resume: Whether an earlier run there is continued.
        sink: Receives the run's events.

    Raises:
        DsftError: A failure while loading, training or saving.
        RunInterrupted: A signal came; a resumable checkpoint was saved.
    """
    setup = _with_checkpoint_plan(setup, checkpoint, sink)
    _hold_to_budget(setup, setup.run_plan.plan)
    model = _load_model(setup, sink)
    # Not before the model is there: an earlier run that is overwritten goes only now.
    run_id = prepare_folders(
        folders,
        resume=resume,
        recipe=recipe(setup.config),
        inputs=inputs,
        facts={"template": setup.data.template.name, "model": setup.model_facts},
    )
    event_log = folders.output_dir / EVENT_LOG
    with RunRecorder(sink, event_log, setup.num_steps, setup.run_plan.gpu_memory) as recorder:
        started_s = time.perf_counter()
        try:
            trainer = _train(setup, model, checkpoint, recorder)
            recorder.tell(Phase("save the adapter"))
            duration_s = time.perf_counter() - started_s
            result = build_result(
                setup, trainer, recorder, run_id=run_id, first_step=first_step_after(checkpoint), duration_s=duration_s
            )
            save_final_adapter(result, trainer, setup.tokenizer.tokenizer, folders)
            return result
        except DoesNotFitError as error:
            raise DoesNotFitError(error.found, f"{error.fix} {_say_how_to_go_on(folders)}".strip()) from error
        except Exception:
            raise
        except BaseException as stop:  # ended at once by a second signal: what is there to go on with?
            way_on = _say_how_to_go_on(folders)
            if way_on:
                stop.add_note(way_on)
            raise


def _say_how_to_go_on(folders: RunFolders) -> str:
    newest = next(iter(list_checkpoints(folders.output_dir)), None)
    if newest is None:
        return ""
    return f"The same command with --resume (and without --overwrite) goes on from {newest}."


def _with_checkpoint_plan(setup: RunSetup, checkpoint: Path | None, sink: EventSink) -> RunSetup:
    if checkpoint is None:
        return setup
    run_plan, notice = keep_checkpoint_plan(setup.run_plan, checkpoint)
    if notice is None:
        return replace(setup, run_plan=run_plan)
    sink(Notice(notice))
    return replace(setup, run_plan=run_plan, notices=(*setup.notices, notice))


def _hold_to_budget(setup: RunSetup, plan: ExecutionPlan) -> None:
    limit_bytes = setup.run_plan.limit_for(plan)
    if limit_bytes is not None:
        limit_allocator(limit_bytes)


def _load_model(setup: RunSetup, sink: EventSink) -> Any:
    config = setup.config
    sink(Phase("load and quantize the model"))
    model = load_quantized(
        setup.source, setup.device, setup.precision, setup.attention, on_notice=lambda text: sink(Notice(text))
    )
    lora = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.seed)
    return attach_lora(model, lora)


def _train(setup: RunSetup, model: Any, checkpoint: Path | None, recorder: RunRecorder) -> QloraTrainer:
    config = setup.config
    first_step = first_step_after(checkpoint)
    run_plan = setup.run_plan
    is_gpu = setup.device.kind == "cuda"
    resumed_state = read_trainer_state(checkpoint) if checkpoint is not None else None

    def on_plan_change(change: PlanChange) -> None:
        _hold_to_budget(setup, change.plan)
        # Peaks are told beside the prediction for the plan that is left.
        torch.cuda.reset_peak_memory_stats()
        recorder.on_plan_change(change, _predict_peak(setup, change.plan))

    def on_step(report: StepReport) -> None:
        control = trainer.control
        recorder.on_step(report, validates_next=control.should_evaluate, saves_next=control.should_save)

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
                validate_first=lacks_first_validation(resumed_state, config.save_steps),
            ),
            sequences=setup.sequences,
            validation=setup.data.validation,
            effective_batch_size=config.effective_batch_size,
            plan=run_plan.plan,
            rate_factor=lambda step: learning_rate_factor(
                step,
                num_warmup_steps=count_warmup_steps(config, setup.num_steps),
                num_steps=setup.num_steps,
                shape=config.lr_scheduler,
            ),
            num_checkpoints_kept=config.save_total_limit,
            num_workers=config.dataloader_num_workers,
            guard=guard,
            blocks=take_blocks(
                model, uses_engine=setup.uses_engine, attention=setup.attention, precision=setup.precision
            ),
            hooks=TrainerHooks(
                on_step,
                recorder.on_validation,
                recorder.on_checkpoint,
                recorder.on_interrupt,
                on_plan_change,
            ),
            shrink=run_plan.shrink if is_gpu else None,
            find_largest=setup.order.largest_micro_batch if is_gpu else None,
        )
        only_ends = resumed_state is not None and first_step >= setup.num_steps
        validates_first = trainer.args.eval_on_start
        if resumed_state is not None and only_ends:
            validates_first = lacks_last_validation(setup, resumed_state)
        recorder.tell(_started(setup, model, first_step, validates_first=validates_first))
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        if checkpoint is not None and resumed_state is not None and only_ends:
            # Only the end is missing: the last validation, if it was cut short, and the final files.
            load_adapter_weights(model, checkpoint)
            trainer.state = resumed_state
            trainer.adopt_best_on_disk()
            if validates_first:
                trainer.evaluate()
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    state = trainer.state
    is_whole = state.global_step >= setup.num_steps and not lacks_last_validation(setup, state)
    if guard.signal_name is not None and not is_whole:
        saved = Path(config.output_dir) / f"checkpoint-{state.global_step}"
        raise RunInterrupted(guard.signal_name, str(saved), state.global_step)
    return trainer


def _started(setup: RunSetup, model: Any, first_step: int, *, validates_first: bool) -> RunStarted:
    config = setup.config
    num_trainable, num_parameters = model.get_nb_trainable_parameters()
    plan = setup.run_plan.plan
    return RunStarted(
        run_name=Path(config.save_dir).resolve().name,
        model_name=config.model_name,
        device=setup.device.name,
        precision=setup.precision,
        attention=setup.attention.description,
        optimizer=setup.optimizer_description,
        num_steps=setup.num_steps,
        first_step=first_step,
        num_epochs=setup.num_epochs,
        effective_batch_size=config.effective_batch_size,
        micro_batch_size=plan.micro_batch_size,
        num_train_samples=len(setup.data.train),
        num_validation_samples=setup.num_validation_samples,
        num_trainable_parameters=num_trainable,
        num_parameters=num_parameters,
        micro_batch_tokens=plan.micro_batch_tokens if plan.splits_by_tokens else None,
        num_recomputed_blocks=plan.num_recomputed,
        num_blocks=setup.run_plan.num_blocks,
        predicted_memory_bytes=_predict_peak(setup, plan),
        validates_first=validates_first,
    )


def _predict_peak(setup: RunSetup, plan: ExecutionPlan) -> int | None:
    """Return the predicted peak of the whole device, in bytes; None on a CPU."""
    predicted = setup.predict_memory(plan)
    return predicted.device_bytes if predicted is not None else None
