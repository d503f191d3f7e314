"""What a training run has told so far, and the run as a sample of that."""

import math
from collections import deque
from typing import TypeVar

from dsft.core.live_runs import LiveRun
from dsft.monitor.event_log import NUM_STEPS_KEPT, Event, read_time_s
from dsft.monitor.sample import RunSample

Value = TypeVar("Value", int, float, str)

_FIRST_TOO_LARGE = 2**53
"""Beyond it a figure has no sense, and may not even be one that can be drawn."""

_OUTCOMES = frozenset({"finished", "stopped", "failed"})

_OVERDUE_STEP_S, _OVERDUE_STEPS = 5.0, 5
"""A run is overdue when the next step takes longer than both: so long, and as long as so many steps."""

_OVERDUE_S = 300.0
"""The same for what is not a step after another: loading, the first step, a validation pass, saving."""


class RunState:
    """What a run has told, as far as it is shown.

    Attributes:
        stage: What it does.
        newest: When it last told anything, ISO 8601; None before.
        outcome: How it ended; None where it has told no end.
    """

    def __init__(self) -> None:
        self.stage = "loading"
        self._start: Event = {}
        self._step: Event = {}
        self._losses: deque[float] = deque(maxlen=NUM_STEPS_KEPT)
        self._validation_loss: float | None = None
        self._best_loss: float | None = None
        self._predicted_bytes: int | None = None
        self._peak_bytes: int | None = None
        self._saves_next = False
        self._is_stopping = False
        self._newest_s: float | None = None
        self.newest: str | None = None
        self.outcome: str | None = None

    @property
    def has_begun(self) -> bool:
        """Whether anything has been told."""
        return self._newest_s is not None

    def take(self, event: Event) -> None:
        """Take the next event."""
        told_s = read_time_s(event)
        if told_s is not None:
            self._newest_s, self.newest = told_s, event["time"]
        kind = event.get("event")
        if kind == "RunStarted":
            self._start = event
            self._predicted_bytes = _get(event, "predicted_memory_bytes", int)
            self._validation_loss = None  # of an earlier process
            self.stage = "validating" if event.get("validates_first") is True else "training"
        elif kind == "StepDone":
            self._take_step(event)
        elif kind == "Validated":
            self._validation_loss = _get(event, "loss", float)
            if event.get("is_best") is True:
                self._best_loss = self._validation_loss
            self.stage = "saving" if self._saves_next else "training"
        elif kind == "CheckpointSaved":
            self.stage = "training"
        elif kind == "Phase":
            self.stage = "saving"  # the only one after the first step
        elif kind == "PlanChanged":
            self._predicted_bytes = _get(event, "predicted_memory_bytes", int)
            self._peak_bytes = None
        elif kind == "InterruptRequested":
            self._is_stopping = True
        elif kind == "RunEnded":
            outcome = _get(event, "outcome", str)
            self.outcome = outcome if outcome in _OUTCOMES else "unknown"
        if self._is_stopping:
            self.stage = "stopping"

    def _take_step(self, event: Event) -> None:
        self._step = event
        self._peak_bytes = _get(event, "peak_memory_bytes", int)
        loss = _get(event, "loss", float)
        if loss is not None:
            self._losses.append(loss)
        self._saves_next = event.get("saves_next") is True
        next_stage = "saving" if self._saves_next else "training"
        self.stage = "validating" if event.get("validates_next") is True else next_stage

    def describe(self, run: LiveRun, stage: str, now_s: float) -> RunSample:
        """Return the run at a time.

        Args:
            run: Which it is.
            stage: What it does.
            now_s: Seconds since the epoch.
        """
        start, step = self._start, self._step
        age_s = None if self._newest_s is None else max(0.0, now_s - self._newest_s)
        is_overdue = self.outcome is None and self._is_overdue(age_s)
        has_ended = self.outcome is not None
        first_step = _get(start, "first_step", int)
        eta_s, told_s, tok_per_s = _get(step, "eta_s", float), read_time_s(step), _get(step, "tok_per_s", float)
        if eta_s is not None and told_s is not None:
            eta_s = max(0.0, eta_s - max(0.0, now_s - told_s))
        return RunSample(
            pid=run.pid,
            run_name=run.run_name,
            started=run.started,
            event_log=run.event_log,
            stage=stage,
            model_name=_get(start, "model_name", str),
            device=_get(start, "device", str),
            first_step=first_step,
            step=_get(step, "step", int) if step else first_step,
            num_steps=_get(start, "num_steps", int),
            epoch=_get(step, "epoch", float),
            num_epochs=_get(start, "num_epochs", float),
            loss=_get(step, "loss", float),
            recent_losses=tuple(self._losses),
            validation_loss=self._validation_loss,
            best_validation_loss=self._best_loss,
            tok_per_s=None if is_overdue or has_ended else tok_per_s,
            step_s=_get(step, "step_s", float),
            eta_s=None if is_overdue or has_ended or told_s is None else eta_s,
            predicted_memory_bytes=self._predicted_bytes,
            peak_memory_bytes=self._peak_bytes,
            last_event_age_s=None if has_ended else age_s,
            is_overdue=is_overdue,
            outcome=self.outcome,
            ended=self.newest if has_ended else None,
        )

    def _is_overdue(self, age_s: float | None) -> bool:
        """Return whether it has told nothing for longer than it should take to the next event."""
        if age_s is None:
            return False
        step_s = _get(self._step, "step_s", float)
        if self.stage != "training" or step_s is None:  # the first step has one-off costs
            return age_s > _OVERDUE_S
        return age_s > max(_OVERDUE_STEP_S, _OVERDUE_STEPS * step_s)


def _get(event: Event, key: str, kind: type[Value]) -> Value | None:
    """Return a value of an event, or None where it has none of that kind."""
    value = event.get(key)
    if isinstance(value, int) and abs(value) >= _FIRST_TOO_LARGE:
        return None
    if kind is float and type(value) is int:
        return kind(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
