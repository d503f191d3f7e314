"""Where the Trainer's loop is listened to: step reports, and the end that a signal asks for."""

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsft.train.reports import StepReport

if TYPE_CHECKING:
    from dsft.train.trainer import QloraTrainer


class Reporter(TrainerCallback):
    """Turns the Trainer's log lines into step reports."""

    def __init__(self, trainer: "QloraTrainer") -> None:
        self._trainer = trainer
        self._last_s = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rehearse, start the clock; a resumed run takes its best loss from the adapter on disk."""
        # A resumed state brings the intervals it was saved with (transformers 5.23); those of this run count.
        state.compute_steps(args, state.max_steps)
        self._trainer.rehearse()
        self._last_s = time.perf_counter()
        if state.global_step > 0:
            self._trainer.adopt_best_on_disk()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report the step that was just logged."""
        if logs is None or "loss" not in logs:
            return
        now_s = time.perf_counter()
        self._trainer.hooks.on_step(
            StepReport(
                step=state.global_step,
                epoch=float(state.epoch or 0.0),
                loss=logs["loss"],
                grad_norm=float(logs["grad_norm"]),
                learning_rate=logs["learning_rate"],
                num_tokens=self._trainer.step_tokens,
                num_targets=self._trainer.step_targets,
                duration_s=now_s - self._last_s,
            )
        )
        self._last_s = now_s

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep validation out of the next step's time."""
        self._last_s = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep checkpoints out of the next step's time."""
        self._last_s = time.perf_counter()


class Interrupter(TrainerCallback):
    """Ends training after the current step with a checkpoint, once a signal came."""

    def __init__(self, trainer: "QloraTrainer") -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end, once a signal came."""
        if self._trainer.guard.signal_name is not None:
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
