"""What a finished run was: configuration, data, losses, speed and memory in one record."""

import dataclasses
import statistics
from dataclasses import replace
from pathlib import Path

import dsft
from dsft.core.host_memory import peak_host_bytes
from dsft.core.versions import versions
from dsft.train.events import PlanChanged, TrainResult
from dsft.train.model_card import write_example_prompt
from dsft.train.recorder import RunRecorder
from dsft.train.setup import RunSetup, describe_techniques
from dsft.train.trainer import QloraTrainer

FINAL_STEPS = 10
"""Steps whose mean is the final training loss: single batches differ too much from one another."""


def build_result(
    setup: RunSetup, trainer: QloraTrainer, recorder: RunRecorder, *, run_id: str, first_step: int, duration_s: float
) -> TrainResult:
    """Collect the result of a run.

    Args:
        setup: What the run used.
        trainer: Trained, with the state of the last step.
        recorder: What the run told.
        run_id: From `prepare_folders`.
        first_step: Steps that were done before this process.
        duration_s: Wall time of the training in this process.
    """
    import psutil
    import torch

    config, state = setup.config, trainer.state
    is_cuda = setup.device.kind == "cuda"
    losses = [(int(log["step"]), float(log["loss"])) for log in state.log_history if "loss" in log]
    validation = [(int(log["step"]), float(log["eval_loss"])) for log in state.log_history if "eval_loss" in log]
    num_trainable, num_parameters = trainer.model.get_nb_trainable_parameters()
    setup = replace(setup, run_plan=replace(setup.run_plan, plan=trainer.plan))  # it may have been made smaller
    # A process that found nothing left to train has no peak of training.
    predicted = setup.predict_memory(trainer.plan) if recorder.steps else None
    tok_per_s, target_tok_per_s, step_s_median = recorder.rates()
    return TrainResult(
        run_name=Path(config.save_dir).resolve().name,
        run_id=run_id,
        save_dir=config.save_dir,
        output_dir=config.output_dir,
        dsft_version=dsft.__version__,
        versions=versions(),
        config=config.model_dump(),
        origins=setup.origins,
        techniques=_describe_techniques(setup, recorder),
        notices=list(setup.notices),
        model={
            **setup.model_facts,
            "family": setup.source.model_config["model_type"],
            "num_parameters": num_parameters,
            "num_trainable_parameters": num_trainable,
            "quantization": "NF4, double quantization",
        },
        tokenizer_fingerprint=setup.tokenizer.fingerprint,
        template=setup.data.template.name,
        data=setup.data.report.as_dict(),
        num_steps=state.global_step,
        num_epochs=setup.num_epochs,
        first_step=first_step,
        duration_s=duration_s,
        train_tok_per_s=tok_per_s,
        train_target_tok_per_s=target_tok_per_s,
        step_s_median=step_s_median,
        first_loss=losses[0][1],
        final_loss=statistics.fmean(loss for _, loss in losses[-FINAL_STEPS:]),
        losses=losses,
        validation_losses=validation,
        best_step=state.best_global_step if validation else None,
        best_validation_loss=state.best_metric,
        kept=config.keep,
        plan=dataclasses.asdict(trainer.plan),
        predicted_memory_allocated_bytes=predicted.allocated_bytes if predicted is not None else None,
        predicted_memory_reserved_bytes=predicted.reserved_bytes if predicted is not None else None,
        predicted_memory_device_bytes=predicted.device_bytes if predicted is not None else None,
        peak_memory_allocated_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
        peak_memory_reserved_bytes=torch.cuda.max_memory_reserved() if is_cuda else None,
        peak_memory_device_bytes=recorder.peak_device_bytes,
        peak_host_memory_bytes=peak_host_bytes(),
        device=setup.device.name,
        memory_total_bytes=setup.device.total_bytes or psutil.virtual_memory().total,
        data_wait_s=trainer.data_wait_s,
        example_prompt=write_example_prompt(setup.data.template),
        events=recorder.history,
    )


def _describe_techniques(setup: RunSetup, recorder: RunRecorder) -> dict[str, str]:
    techniques = describe_techniques(setup)
    steps = [str(event["step"]) for event in recorder.history if event["event"] == PlanChanged.__name__]
    if steps:
        techniques["plan"] += f"; made smaller when memory ran out (step {', '.join(steps)})"
    return techniques
