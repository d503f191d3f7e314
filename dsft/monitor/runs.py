"""Follows the training runs that are going on on this machine, by the files they leave and by their event logs."""

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from dsft.core.live_runs import LiveRun, read_live_runs
from dsft.core.paths import live_runs_dir
from dsft.monitor.event_log import NUM_STEPS_KEPT, Event, EventLog, read_time_s
from dsft.monitor.sample import RunSample

Value = TypeVar("Value", int, float, str)


_FIRST_TOO_LARGE = 2**53
"""Beyond it a figure has no sense, and may not even be one that can be drawn."""


class LiveRuns:
    """Reads all runs.

    Args:
        folder: Where their files are; the user's own by default.
        clock: Tells the time in seconds since the epoch.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder if folder is not None else _find_folder()
        self._clock = clock
        self._followed: dict[LiveRun, _FollowedRun] = {}

    def read(self) -> tuple[RunSample, ...]:
        """Return the runs that are going on now, oldest first."""
        runs = read_live_runs(self._folder) if self._folder is not None else ()
        for run in [run for run in self._followed if run not in runs]:
            self._followed.pop(run).close()
        now_s = self._clock()
        return tuple(self._follow(run).read(now_s) for run in runs)

    def _follow(self, run: LiveRun) -> "_FollowedRun":
        if run not in self._followed:
            self._followed[run] = _FollowedRun(run)
        return self._followed[run]


class _FollowedRun:
    """One run, its event log and what that has told so far."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run
        self._log = EventLog(Path(run.event_log), _parse_time_s(run.registered))
        self._state = _RunState()

    def close(self) -> None:
        """Close the event log."""
        self._log.close()

    def read(self, now_s: float) -> RunSample:
        """Return the run as it is now."""
        stage = self._state.stage
        try:
            new = self._log.read()
        except FileNotFoundError:
            # The log is made once the model is loaded; a run in a container has its folders where they can't be seen.
            if not Path(self._run.output_dir).is_dir():
                stage = "unknown"
        except OSError:
            stage = "unknown"
        else:
            if new.begins_anew:
                self._state = _RunState()
            for event in new.events:
                self._state.take(event)
            stage = self._state.stage
        return self._state.describe(self._run, stage, now_s)


class _RunState:
    """What a run has told, as far as it is shown."""

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

    def take(self, event: Event) -> None:
        """Take the next event."""
        self._newest_s = read_time_s(event) or self._newest_s
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
        first_step = _get(start, "first_step", int)
        eta_s, told_s = _get(step, "eta_s", float), read_time_s(step)
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
            tok_per_s=_get(step, "tok_per_s", float),
            step_s=_get(step, "step_s", float),
            eta_s=None if eta_s is None or told_s is None else max(0.0, eta_s - max(0.0, now_s - told_s)),
            predicted_memory_bytes=self._predicted_bytes,
            peak_memory_bytes=self._peak_bytes,
            last_event_age_s=None if self._newest_s is None else max(0.0, now_s - self._newest_s),
        )


def _find_folder() -> Path | None:
    try:
        return live_runs_dir()
    except RuntimeError:  # the user has no home folder
        return None


def _parse_time_s(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return 0.0


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
